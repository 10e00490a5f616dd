"""Tensors as tables of addresses, for the C extension `_cpu`.

Every step checks every tensor. The checks are passes over lists that call no Python function per
tensor, and run only once for a `Column`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ._pieces import flat
from .contract import Column

# as in _cpu.c
KINDS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_EXPANDED = 8
DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")


def address(table: array[int]) -> int:
    """Return the address of the table's first entry."""
    return table.buffer_info()[0]


def _plain(tensors: Sequence[Tensor]) -> bool:
    return (
        all(map(Tensor.is_contiguous, tensors))
        and all(map(_IS_CPU, tensors))
        and KINDS.keys() >= set(map(DTYPE, tensors))
    )


def flat_row(columns: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """Return the columns (of one shape) in one memory order, or None if that is not possible."""
    if _plain(columns):
        return columns
    if not all(t.is_cpu and t.dtype in KINDS for t in columns):
        return None
    return flat(columns)


def walkable(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Split tensors into those that the extension can walk (dense or expanded) and the rest."""
    if table_of(tensors) is not None:
        return tensors, ()
    taken, rest = [], []
    for t in tensors:
        dense = flat_row((t,))
        if dense is None:
            rest.append(t)
        else:
            taken.append(dense[0])
    return taken, rest


class Table(NamedTuple):
    """The addresses and kinds of tensors that are contiguous or one expanded value.

    Both are 0 for a missing tensor.
    """

    at: array[int]
    kind: array[int]

    @property
    def expands(self) -> bool:
        """Whether a tensor is one expanded value."""
        return max(self.kind, default=0) >= _EXPANDED

    def picked(self, rows: Sequence[int]) -> Table:
        at, kind = (map(column.__getitem__, rows) for column in self)
        return Table(array("Q", at), array("q", kind))


def table_of(tensors: Sequence[Tensor | None]) -> Table | None:
    """Return the table of the tensors, cached for a `Column`; None if one cannot be walked."""
    if not isinstance(tensors, Column):
        return _tabulated(tensors)
    if "cpu" not in tensors.notes:
        whole, rows = tensors.of or (None, ())
        known = whole.notes.get("cpu") if whole is not None else None
        tensors.notes["cpu"] = _tabulated(tensors) if known is None else known.picked(rows)
    return tensors.notes["cpu"]


def _tabulated(tensors: Sequence[Tensor | None]) -> Table | None:
    there = [t for t in tensors if t is not None]
    dtypes = list(map(DTYPE, there))
    if not (all(map(_IS_CPU, there)) and KINDS.keys() >= set(dtypes)):
        return None
    kind = array("q", map(KINDS.__getitem__, dtypes))
    if not all(map(Tensor.is_contiguous, there)):
        for i, t in enumerate(there):
            if not t.is_contiguous():
                if any(st for st, s in zip(t.stride(), t.shape) if s > 1):
                    return None
                kind[i] |= _EXPANDED
    at = array("Q", map(Tensor.data_ptr, there))
    if len(there) == len(tensors):
        return Table(at, kind)
    whole = Table(*(array(code, bytes(8 * len(tensors))) for code in "Qq"))
    rows = (i for i, t in enumerate(tensors) if t is not None)
    for i, address, k in zip(rows, at, kind, strict=True):
        whole.at[i], whole.kind[i] = address, k
    return whole


def ends(tensors: Sequence[Tensor]) -> array[int]:
    sizes = tensors.sizes if isinstance(tensors, Column) else map(Tensor.numel, tensors)
    return array("q", accumulate(sizes))


class List:
    """The addresses, kinds and ends of tensors that are dense or one expanded value."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.at, self.kind = table_of(tensors)  # type: ignore[misc]
        self.end = ends(tensors)
        self.n = self.end[-1] if tensors else 0

    def arguments(self) -> tuple[int, int, int, int]:
        return address(self.at), address(self.kind), address(self.end), len(self.at)


def tables_of(
    columns: Sequence[Sequence[Tensor | None]],
) -> tuple[list[Table], Sequence[int], Sequence[int]]:
    """Return the columns' tables over the rows that the extension can walk.

    Each of these rows has one memory order. The other results are the numbers of these rows and of
    the remaining rows.
    """
    tables = [table for column in columns if (table := table_of(column)) is not None]
    if len(tables) == len(columns) and not tables[0].expands:
        return tables, range(len(columns[0])), ()
    taken: list[list[Tensor | None]] = []
    rows, left = [], []
    for i, row in enumerate(zip(*columns, strict=True)):
        dense = flat_row([t for t in row if t is not None])
        if dense is None:
            left.append(i)
        else:
            parts = iter(dense)
            taken.append([None if t is None else next(parts) for t in row])
            rows.append(i)
    made = [_tabulated(column) for column in zip(*taken, strict=True)]
    return [table for table in made if table is not None], rows, left
