"""The combination: which rows one launch takes, and its launches; also `restore`, its inverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _launch, _tables, chunked
from ._launch import OPTIONS, on, runs_on
from ._pieces import flat_stride
from ._tables import KINDS, Launch
from .contract import STATS, Columns, Update

Row = Sequence[Any]  # tensors, None where a column is missing; theta first


class _Table(NamedTuple):
    chunks: Tensor  # [11, chunks]
    launches: list[Launch]
    host: Tensor


def _columns(row: Row, device: torch.device) -> tuple[int, ...] | None:
    """Return KIND and stride of every column of a row; None if the kernel cannot take the row.

    theta comes first. The other columns must have theta's layout or be one expanded value.
    """
    theta = row[0]
    if flat_stride(theta) != 1:
        return None
    found: list[int] = []
    lead = None if theta.is_contiguous() else theta.stride()
    for t in row:
        if t is None:
            found += (-1, 0)
            continue
        kind = KINDS.get(t.dtype)
        alike = t.is_contiguous() if lead is None else t.stride() == lead
        if kind is None or t.device != device or not (alike or flat_stride(t) == 0):
            return None
        found += (kind, int(alike))
    return tuple(found)


def _table(
    rows: list[Row],
    columns: list[tuple[int, ...]],
    pairs: list[tuple[int, int]],
    device: torch.device,
) -> _Table:
    both = np.array(columns, np.int64).reshape(len(rows), 7, 2).transpose(2, 1, 0)
    kinds, strides = both
    order = np.lexsort(kinds)
    addresses = np.array([[0 if t is None else t.data_ptr() for t in row] for row in rows]).T
    sizes = np.array([row[0].numel() for row in rows])
    keys = np.array(pairs).T
    kinds, strides, addresses, keys = (a[:, order] for a in (kinds, strides, addresses, keys))
    row_of, at, length, full = _tables.split(addresses, kinds, strides, sizes[order], _tables.CHUNK)
    bits = (strides << np.arange(7)[:, None]).sum(0)
    table = np.concatenate(
        [at, length[None], keys[:, row_of], (bits[row_of] | full.astype(np.int64) << 7)[None]]
    )
    (chunks,), host = _tables.upload([table], device)
    return _Table(chunks, _tables.launches(kinds[:, row_of]), host)


def _rows_table(
    rows: list[Row], device: torch.device, pairs: list[tuple[int, int]]
) -> tuple[_Table | None, list[int]]:
    """Return the table of the rows that a kernel takes, and the indices of the other rows."""
    taken: list[int] = []
    columns: list[tuple[int, ...]] = []
    others: list[int] = []
    for i, row in enumerate(rows):
        found = _columns(row, device) if runs_on(device) else None
        if found is None:
            others.append(i)
        elif row[0].numel():
            taken.append(i)
            columns.append(found)
    if not taken:
        return None, others
    key = [
        (rows[i][0].numel(), pairs[i], found, *(0 if t is None else t.data_ptr() for t in rows[i]))
        for i, found in zip(taken, columns)
    ]
    table: _Table = _tables.cached(
        (device, _tables.CHUNK, *key),
        device,
        lambda: _table([rows[i] for i in taken], columns, [pairs[i] for i in taken], device),
    )
    return table, others


@torch.compiler.disable
@torch.no_grad()
def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """As `reference.combine`, but `online` may be a 0-d tensor. Tensors are read on the device."""
    device = stats.device
    rows: list[Row] = list(zip(*columns.tensors, strict=True))
    table, others = None, list(range(len(rows)))
    if how.dtype == torch.float32 and taus.device == device:
        pairs = list(zip(columns.pool_f, columns.pool_r, strict=True))
        table, others = _rows_table(rows, device, pairs)
    if table is not None:
        there: Any = (x.to(device) if isinstance(x, Tensor) else x for x in how)
        with on(device):
            _combine(table, taus, Update(*there), stats)
    if others:
        online = how.online.item() if isinstance(how.online, Tensor) else how.online
        chunked.combine(columns.rows(others), taus, how._replace(online=online), stats)


def _packed(kinds: Sequence[int]) -> int:
    """Return KINDS of `_triton_combination`: a base-4 digit per column, 3 if it is missing."""
    return sum(kind % 4 * 4**j for j, kind in enumerate(kinds))


def _combine(table: _Table, taus: Tensor, how: Update, stats: Tensor) -> None:
    kernels, device = _launch.kernels(), table.chunks.device
    n_chunks = table.chunks.shape[1]
    partial = torch.empty(len(STATS), n_chunks, dtype=torch.float64, device=device)
    *weights, penalty = how.weights
    for kinds, first, count in table.launches:
        penalized = kinds[3] >= 0 and kinds[4] >= 0  # theta0 and F
        kernels.combine_kernel[(count,)](
            table.chunks,
            n_chunks,
            first,
            taus,
            *weights,
            how.gamma,
            how.online,
            how.inv_scale,
            partial,
            KINDS=_packed(kinds),
            PENALTY=penalty if penalized else "none",
            GAMMA_AT=isinstance(how.gamma, Tensor),
            ONLINE_AT=isinstance(how.online, Tensor),
            CHUNK=_tables.CHUNK,
            TILE=min(_launch.TILE, 512 if max(kinds) == 0 else 1024),
            LANE=4 if max(kinds) == 0 else 8,
            **OPTIONS,
        )
    kernels.reduce_kernel[(len(STATS),)](partial, n_chunks, stats, BLOCK=1024, **OPTIONS)


@torch.compiler.disable
@torch.no_grad()
def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """As `reference.restore`, with one launch per dtype."""
    if not params:
        return
    device = params[0].device
    rows: list[Row] = [(p, *[None] * 5, h) for p, h in zip(params, held) if h is not None]
    table, others = _rows_table(rows, device, [(0, 0)] * len(rows))
    if table is not None:
        with on(device):
            for kinds, first, count in table.launches:
                _launch.kernels().restore_kernel[(count,)](
                    table.chunks,
                    table.chunks.shape[1],
                    first,
                    KINDS=_packed(kinds),
                    CHUNK=_tables.CHUNK,
                    TILE=_launch.TILE,
                    **OPTIONS,
                )
    chunked.restore([rows[i][0] for i in others], [rows[i][6] for i in others])
