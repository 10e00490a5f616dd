"""The fused kernels for a CPU: the contract of `reference` over the C extension `_cpu`.

Here tensors become tables of addresses; the work is in _cpu.c. What that does not take (float64,
layouts that are not dense, theta0 or F on another device) goes to `chunked`, tensor by tensor
where it can. The results are the same: keys, masks and counts bit for bit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import Any

import torch  # first: the extension uses the OpenMP library that torch has loaded
from torch import Tensor

from . import chunked
from ._pieces import flat
from .chunked import scale
from .contract import STATS, Columns, Update

_missing = ""
try:
    from . import _cpu  # type: ignore[attr-defined]
except ImportError as error:
    _cpu = None
    _missing = str(error)

__all__ = ["combine", "finite_probe", "histogram", "restore", "scale", "select"]

# as in _cpu.c
_KIND = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_EXPANDED = 8
_TASK = 1 << 16
_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")
PATHS = ("direct", "bracket", "second bracket", "radix")


def available() -> str | None:
    """None where the extension is there, else why it is not."""
    if _cpu is not None:
        return None
    return f"the C extension ebu_optim.kernels._cpu was not built for this Python ({_missing})"


def takes(tensors: Sequence[Tensor]) -> str | None:
    """None where these tensors gain from this module, else why they do not."""
    other = {str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype not in _KIND}
    return f"the fused CPU kernels take no {', '.join(sorted(other))}" if other else None


# -- tables of addresses ------------------------------------------------------------------------


def _threads(n: int) -> int:
    """No more threads than there are tasks."""
    return max(1, min(torch.get_num_threads(), -(-n // _TASK)))


def _address(table: array[int]) -> int:
    return table.buffer_info()[0]


def _plain(tensors: Sequence[Tensor]) -> bool:
    return (
        all(map(Tensor.is_contiguous, tensors))
        and all(map(_IS_CPU, tensors))
        and _KIND.keys() >= set(map(_DTYPE, tensors))
    )


def _flat(columns: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The columns (of one shape) in one memory order, or None where the extension cannot walk
    them."""
    if _plain(columns):
        return columns
    if not all(t.is_cpu and t.dtype in _KIND for t in columns):
        return None
    return flat(columns)


def _walkable(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the extension walks, as dense tensors, and the rest."""
    if _plain(tensors):
        return tensors, ()
    taken, rest = [], []
    for t in tensors:
        flat = _flat((t,))
        if flat is None:
            rest.append(t)
        else:
            taken.append(flat[0])
    return taken, rest


def _kinds(tensors: Sequence[Tensor]) -> array[int]:
    """Of dense tensors, or of one value expanded to one dimension."""
    kinds = array("q", map(_KIND.__getitem__, map(_DTYPE, tensors)))
    if not all(map(Tensor.is_contiguous, tensors)):
        for i, t in enumerate(tensors):
            if not t.is_contiguous():
                kinds[i] |= _EXPANDED
    return kinds


class _List:
    """The addresses, kinds and ends of dense tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.at = array("Q", map(Tensor.data_ptr, tensors))
        self.kind = _kinds(tensors)
        self.end = array("q", accumulate(map(Tensor.numel, tensors)))
        self.n = self.end[-1] if tensors else 0

    def arguments(self) -> tuple[int, int, int, int]:
        return _address(self.at), _address(self.kind), _address(self.end), len(self.at)


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
    """Also the path that each pool took: one of `PATHS`, or "reference"."""
    keys = torch.zeros(len(pools), dtype=torch.int64)
    nonfinite, took = torch.zeros_like(keys), torch.zeros_like(keys)
    at, kind, end = array("Q"), array("q"), array("q")
    first, taken, total = array("q", [0]), [], 0
    for p, (grads, k) in enumerate(pools):
        flat, rest = _walkable(grads)
        n = sum(map(Tensor.numel, grads))
        if not 1 <= k <= n:
            raise ValueError(f"k must be in 1..{n}, the number of elements, got {k}")
        if rest or dtype != torch.float32:
            keys[p : p + 1], nonfinite[p : p + 1] = chunked.select([(grads, k)], dtype)
            continue
        listed = _List(flat)
        at += listed.at
        kind += listed.kind
        end += listed.end  # counted from the pool's start
        first.append(len(at))
        taken.append(p)
        total += n
    if taken:
        ranks = array("q", [pools[p][1] for p in taken])
        found = torch.zeros(3, len(taken), dtype=torch.int64)
        _cpu.select(
            _address(at), _address(kind), _address(end), len(at), _address(first), _address(ranks),
            len(taken), *(row.data_ptr() for row in found),
            _threads(total),
        )  # fmt: skip
        where = torch.tensor(taken)
        keys[where], nonfinite[where], took[where] = found
    paths = ["reference"] * len(pools)
    for p in taken:
        paths[p] = PATHS[took[p]]
    return keys, nonfinite, paths


def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.histogram`."""
    taken, rest = _walkable(grads)
    if rest or dtype != torch.float32:
        return chunked.histogram(grads, prefix, shift, bits, dtype)
    listed = _List(taken)
    counts = torch.zeros(1 << bits, dtype=torch.int64)
    prefix = int(prefix)
    if prefix >> max(0, 31 - shift - bits) == 0:  # else no key begins so
        _cpu.histogram(
            *listed.arguments(), prefix, shift, bits, counts.data_ptr(), _threads(listed.n)
        )
    return counts


def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """As `reference.finite_probe`."""
    taken, rest = _walkable(tensors)
    listed = _List(taken)
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
    taken: Sequence[Sequence[Tensor | None]] = columns.tensors
    rows = left
    if how.dtype == torch.float32:
        taken, rows, left = _walkable_rows(taken)
    if left:
        chunked.combine(columns.rows(left), taus, how, stats)
    if not rows or how.dtype != torch.float32:
        return
    on_f, on_r, on_m, only_r, blend, penalty = how.weights()
    strength = float(how.gamma)
    numbers = (
        on_f, on_r, on_m, only_r, blend,
        strength if penalty == "partial" else 0.0,
        strength if penalty == "full" else 0.0,
        -1.0 if how.online is None else how.online,
        1.0 if how.inv_scale is None else float(how.inv_scale),
    )  # fmt: skip
    at, kind = array("Q"), array("q")  # column after column
    for column in taken:
        column_at, column_kind = _column(column)
        at += column_at
        kind += column_kind
    end = array("q", accumulate(map(Tensor.numel, taken[0])))  # type: ignore[arg-type]
    found = taus.clamp(min=1).tolist()  # zeros are never selected
    pools = columns.pool_f, columns.pool_r
    key_f, key_r = (array("q", [found[pool[i]] for i in rows]) for pool in pools)
    sums = torch.zeros(len(STATS), dtype=torch.float64)
    _cpu.combine(
        _address(at), _address(kind), _address(end), len(rows), _address(key_f), _address(key_r),
        numbers, penalty != "none", sums.data_ptr(), _threads(end[-1]),
    )  # fmt: skip
    stats += sums.to(stats)


def _column(tensors: Sequence[Tensor | None]) -> tuple[array[int], array[int]]:
    """The addresses and kinds of dense tensors; 0 where there is none."""
    there = [t for t in tensors if t is not None]
    if len(there) == len(tensors):
        return array("Q", map(Tensor.data_ptr, there)), _kinds(there)
    at, kind = array("Q", bytes(8 * len(tensors))), array("q", bytes(8 * len(tensors)))
    if there:
        rows = [i for i, t in enumerate(tensors) if t is not None]
        for i, t, k in zip(rows, there, _kinds(there), strict=True):
            at[i], kind[i] = t.data_ptr(), k
    return at, kind


def _walkable_rows(
    columns: Sequence[Sequence[Tensor | None]],
) -> tuple[Sequence[Sequence[Tensor | None]], Sequence[int], Sequence[int]]:
    """The columns of the rows that the extension walks, in one memory order each, and the numbers
    of these rows and of the others."""
    if all(_plain([t for t in column if t is not None]) for column in columns):
        return columns, range(len(columns[0])), ()
    taken: list[list[Tensor | None]] = []
    rows, left = [], []
    for i, row in enumerate(zip(*columns, strict=True)):
        flat = _flat([t for t in row if t is not None])
        if flat is None:
            left.append(i)
        else:
            parts = iter(flat)
            taken.append([None if t is None else next(parts) for t in row])
            rows.append(i)
    return [list(column) for column in zip(*taken, strict=True)], rows, left


def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """As `reference.restore`."""
    pairs: list[Any] = []
    for theta, kept in zip(params, held, strict=True):
        flat = _flat((theta, kept)) if kept is not None and kept.dtype == theta.dtype else None
        if flat is None:
            chunked.restore([theta], [kept])
        else:
            pairs.append(flat)
    if pairs:
        to = array("Q", [theta.data_ptr() for theta, _ in pairs])
        listed = _List([kept for _, kept in pairs])
        _cpu.restore(_address(to), *listed.arguments(), _threads(listed.n))
