"""The fused kernels for a CPU: the contract of `reference` over the C extension `_cpu`.

_cpu.c does the work over the tables of _cpu_tables.py. What it does not support (float64, layouts
that are not dense, theta0 or F on another device) goes to `chunked`, tensor by tensor where
possible. The results are the same: keys, masks and counts bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch  # first, because the extension uses the OpenMP library that torch has loaded
from torch import Tensor

from . import chunked
from ._cpu_tables import DTYPE, KINDS, List, address, ends, flat_row, table_of, tables_of, walkable
from .chunked import scale
from .contract import STATS, Column, Columns, Update

_missing = ""
try:
    from . import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _cpu = None
    _missing = str(error)

__all__ = ["combine", "finite_probe", "histogram", "restore", "scale", "select"]

_TASK = 1 << 16  # as in _cpu.c
#: From this many scalars on, several threads share the work. With fewer scalars they wait for each
#: other longer than they save if anything else runs on the machine (docs/benchmarks.md).
_TEAM = 1 << 24
PATHS = ("direct", "bracket", "second bracket", "radix")


def available() -> str | None:
    """Return None if the extension was built, else the reason why it is missing."""
    if _cpu is not None:
        return None
    return f"the C extension ebu_optim.kernels._cpu was not built for this Python ({_missing})"


def takes(tensors: Sequence[Tensor]) -> str | None:
    """Return None if these tensors gain from this module, else the reason why they do not."""
    other = {str(t).removeprefix("torch.") for t in set(map(DTYPE, tensors)) - KINDS.keys()}
    return f"the fused CPU kernels do not support {', '.join(sorted(other))}" if other else None


def walks(tensors: Sequence[Tensor]) -> bool:
    """Whether this is a `Column` of dense CPU tensors that are float32 or smaller.

    One look at them finds that out, and their addresses, for the whole life of the column."""
    return isinstance(tensors, Column) and table_of(tensors) is not None


def _threads(n: int) -> int:
    """Return 1 below `_TEAM` scalars, else at most the number of tasks."""
    return min(torch.get_num_threads(), -(-n // _TASK)) if n >= _TEAM else 1


# -- selection ----------------------------------------------------------------------------------


def select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.select`."""
    keys, nonfinite, _ = _select(pools, dtype)
    return keys, nonfinite


def _select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[str]]:
    """Like `select`, and return the path that each pool took: one of `PATHS`, or "reference"."""
    found = torch.zeros(3, len(pools), dtype=torch.int64)
    keys, nonfinite = found[0], found[1]
    at, kind, end = array("Q"), array("q"), array("q")
    first, taken, total = array("q", [0]), [], 0
    for p, (grads, k) in enumerate(pools):
        flat, rest = walkable(grads)
        dense = List(flat)
        n = dense.n + sum(map(Tensor.numel, rest))
        if not 1 <= k <= n:
            raise ValueError(f"k must be in 1..{n}, the number of elements; got {k}")
        if rest or dtype != torch.float32:
            keys[p : p + 1], nonfinite[p : p + 1] = chunked.select([(grads, k)], dtype)
            continue
        at += dense.at
        kind += dense.kind
        end += dense.end  # relative to the pool's start
        first.append(len(at))
        taken.append(p)
        total += n
    paths = ["reference"] * len(pools)
    if taken:
        ranks = array("q", [pools[p][1] for p in taken])
        here = found if len(taken) == len(pools) else found[:, taken]
        _cpu.select(
            address(at),
            address(kind),
            address(end),
            len(at),
            address(first),
            address(ranks),
            len(taken),
            *(here.data_ptr() + row * here.stride(0) * 8 for row in range(3)),
            _threads(total),
        )
        if here is not found:
            found[:, taken] = here
        for p, path in zip(taken, here[2].tolist(), strict=True):
            paths[p] = PATHS[path]
    return keys, nonfinite, paths


def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.histogram`."""
    taken, rest = walkable(grads)
    if rest or dtype != torch.float32:
        return chunked.histogram(grads, prefix, shift, bits, dtype)
    listed = List(taken)
    counts = torch.zeros(1 << bits, dtype=torch.int64)
    prefix = int(prefix)
    if prefix >> max(0, 31 - shift - bits) == 0:  # otherwise no key has this prefix
        _cpu.histogram(
            *listed.arguments(), prefix, shift, bits, counts.data_ptr(), _threads(listed.n)
        )
    return counts


def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """As `reference.finite_probe`."""
    taken, rest = walkable(tensors)
    listed = List(taken)
    found = chunked.finite_probe(rest) if rest else None
    if listed.n:
        bad = _cpu.count_nonfinite(*listed.arguments(), _threads(listed.n))
        probe = torch.tensor(float("nan") if bad else 0.0)
        found = probe if found is None else found + probe.to(found.device)
    return found


# -- combination --------------------------------------------------------------------------------


def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """As `reference.combine`."""
    left: Sequence[int] = range(len(columns.params))
    rows = left[:0]
    if how.dtype == torch.float32:
        tables, rows, left = tables_of(columns.tensors)
    if left:
        chunked.combine(columns.rows(left), taus, how, stats)
    if not rows:
        return
    on_f, on_r, on_m, only_r, blend, penalty = how.weights
    strength = float(how.gamma)
    numbers = (
        on_f,
        on_r,
        on_m,
        only_r,
        blend,
        strength if penalty == "partial" else 0.0,
        strength if penalty == "full" else 0.0,
        -1.0 if how.online is None else how.online,
        1.0 if how.inv_scale is None else float(how.inv_scale),
    )
    at, kind = array("Q"), array("q")  # column after column
    for table in tables:
        at += table.at
        kind += table.kind
    whole = len(rows) == len(columns.params)
    end = ends(columns.params if whole else [columns.params[i] for i in rows])
    found = [max(1, key) for key in taus.tolist()]  # zeros are never selected
    pools = (
        pool if whole else [pool[i] for i in rows] for pool in (columns.pool_f, columns.pool_r)
    )
    key_f, key_r = (array("q", map(found.__getitem__, pool)) for pool in pools)
    sums = stats if stats.is_cpu else torch.zeros(len(STATS), dtype=torch.float64)
    _cpu.combine(
        address(at),
        address(kind),
        address(end),
        len(rows),
        address(key_f),
        address(key_r),
        numbers,
        penalty != "none",
        how.counted,
        sums.data_ptr(),
        _threads(end[-1]),
    )
    if sums is not stats:
        stats += sums.to(stats)


def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """As `reference.restore`."""
    pairs: list[Any] = []
    for theta, kept in zip(params, held, strict=True):
        flat = flat_row((theta, kept)) if kept is not None and kept.dtype == theta.dtype else None
        if flat is None:
            chunked.restore([theta], [kept])
        else:
            pairs.append(flat)
    if pairs:
        to = array("Q", [theta.data_ptr() for theta, _ in pairs])
        listed = List([kept for _, kept in pairs])
        _cpu.restore(address(to), *listed.arguments(), _threads(listed.n))
