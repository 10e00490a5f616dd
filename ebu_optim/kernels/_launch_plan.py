"""The plan of a selection: the chunks of all gradients, their pools, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _tables
from ._pieces import flat_stride
from ._tables import KINDS, Launch

#: A pool with at least this many elements gets a window. A window costs a sample and 4 MiB of exact
#: counts (a few KiB if all gradients of the pool have 16 bits).
WINDOW_MIN, WINDOW_MIN_16 = 1 << 23, 1 << 20
SAMPLE_MIN, SAMPLE_MAX = 1 << 16, 1 << 20
#: Number of bins in a window. 16 bins hold 9 standard deviations of the sample even if magnitudes
#: are spread over many decades.
WIDTH = 16
_LOW_ZEROS = {0: 0, 1: 13, 2: 16}

Pools = Sequence[tuple[Sequence[Tensor], int]]  # gradients ranked together, and the rank k


class Plan(NamedTuple):
    """Tables of one selection on the device, and what to launch over them."""

    chunks: Tensor  # [5, chunks]
    pools: Tensor  # [6, pools]
    members: Tensor  # the pools that have a window
    windowed: list[Launch]
    all: list[Launch]
    bins: int  # number of bins of all windows
    folds: int  # number of programs that add up one window's bins
    wide: bool  # whether a pool has more elements than 32 bits can count
    host: Tensor


def _plan(pools: Pools, strides: list[int], device: torch.device) -> Plan:
    grads = [g for members, _ in pools for g in members]
    pool_of = np.repeat(np.arange(len(pools)), [len(members) for members, _ in pools])
    sizes = np.array([g.numel() for g in grads])
    kinds = np.array([KINDS[g.dtype] for g in grads])
    addresses = np.array([g.data_ptr() for g in grads])

    total = np.zeros(len(pools), np.int64)
    np.add.at(total, pool_of, sizes)
    shift = np.full(len(pools), 16)
    np.minimum.at(shift, pool_of, np.array([_LOW_ZEROS[k] for k in kinds.tolist()]))
    has_window = total >= np.where(shift == 0, WINDOW_MIN, WINDOW_MIN_16)
    members = np.flatnonzero(has_window)
    bins = np.where(has_window, (WIDTH << 16) >> shift, 0)
    window = np.where(has_window, np.cumsum(has_window) - 1, -1)
    samples = np.clip(total // 64, SAMPLE_MIN, SAMPLE_MAX)
    ranks = np.array([k for _, k in pools])
    pool_table = np.stack([total, ranks, window, shift, np.cumsum(bins) - bins, samples])

    # the chunks of one launch are adjacent
    order = np.lexsort((kinds, ~has_window[pool_of]))
    pool_of, sizes, kinds, addresses = (a[order] for a in (pool_of, sizes, kinds, addresses))
    steps = np.array(strides)[order]
    row, at, length, full = _tables.split(
        addresses[None], kinds[None], steps[None], sizes, _tables.CHUNK
    )
    chunks = np.stack([at[0], length, pool_of[row], steps[row], full])
    n_windowed = int(has_window[pool_of[row]].sum())
    kinds = kinds[row][None]
    windowed = _tables.launches(kinds[:, :n_windowed])
    (on_chunks, on_pools, on_members), host = _tables.upload([chunks, pool_table, members], device)
    return Plan(
        on_chunks,
        on_pools,
        on_members,
        windowed,
        windowed + _tables.launches(kinds[:, n_windowed:], n_windowed),
        int(bins.sum()),
        max(1, int(bins.max()) // 4096),
        bool(total.max() >= 1 << 31),
        host,
    )


def read_plan(pools: Pools, device: torch.device) -> tuple[Plan, object]:
    """Return the plan for these gradients, and objects that must live until the launches.

    A gradient whose layout is not one stretch of memory is copied.
    """
    dense, strides, key = [], [], []
    for members, k in pools:
        row: list[Tensor] = []
        for g in members:
            if g.numel():
                stride = flat_stride(g)
                row.append(g if stride is not None else g.contiguous())
                strides.append(1 if stride is None else stride)
        n = sum(g.numel() for g in row)
        if not 1 <= k <= n:
            raise ValueError(f"k must be in 1..{n}, the number of elements; got {k}")
        dense.append((row, k))
        key.append((k, *((g.data_ptr(), g.numel(), g.dtype) for g in row)))
    settings = (WINDOW_MIN, WINDOW_MIN_16, SAMPLE_MIN, SAMPLE_MAX, WIDTH, _tables.CHUNK)
    full_key = ("select", device, settings, tuple(key), tuple(strides))
    plan: Plan = _tables.cached(full_key, device, lambda: _plan(dense, strides, device))
    return plan, dense
