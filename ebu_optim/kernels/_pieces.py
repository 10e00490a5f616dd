"""Walks over tensors in bounded pieces, which `chunked` processes one at a time.

On a CPU, speed needs two things: a chunk's buffers stay in the cache, and no operation makes or
reads a bool tensor. torch does not vectorise bool tensors; they cost four times as much as floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# One chunk's buffers fit the caches of a CPU core; an accelerator needs few launches.
CHUNK_CPU = 1 << 19
CHUNK_DEVICE = 1 << 22


def flat_stride(t: Tensor) -> int | None:
    """Return 1 if the elements fill one stretch of memory in some order, 0 if all are one element.

    Otherwise return None.
    """
    if t.is_contiguous():
        return 1
    pairs = sorted((st, s) for st, s in zip(t.stride(), t.shape) if s > 1)
    if all(st == 0 for st, _ in pairs):
        return 0
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return None
        expected *= size
    return 1


def flat(columns: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the columns as 1-d views in memory order, or None if their layouts differ.

    A column whose strides are all 0 (one expanded value) fits any layout.
    """
    lead = columns[0]
    contiguous = lead.is_contiguous()
    if flat_stride(lead) != 1:
        return None
    views = []
    for c in columns:
        if contiguous and c.is_contiguous():
            views.append(c.view(-1))
        elif c.stride() == lead.stride():
            views.append(c.as_strided((c.numel(),), (1,)))
        elif flat_stride(c) == 0:
            views.append(c.as_strided((c.numel(),), (0,)))
        else:
            return None
    return views


def pieces(columns: Sequence[Tensor], chunk: int | None = None) -> Iterator[Sequence[Tensor]]:
    """Yield views of the same elements of every column, at most `chunk` elements at a time.

    Columns have the same shape. The pieces cover each element once, in any order.
    """
    lead = columns[0]
    n = lead.numel()
    if chunk is None:
        chunk = CHUNK_CPU if lead.device.type == "cpu" else CHUNK_DEVICE
    if n <= chunk:
        if n:
            yield columns
        return
    views = flat(columns)
    if views is not None:
        yield from zip(*(c.split(chunk) for c in views), strict=True)
    else:
        axis = max(range(lead.dim()), key=lambda d: lead.shape[d])
        for part in zip(*(c.tensor_split(2, axis) for c in columns), strict=True):
            yield from pieces(part, chunk)


def packs(
    rows: Sequence[Sequence[Tensor]], tags: Sequence[Any] | None = None
) -> Iterator[tuple[Any, list[Sequence[Tensor]]]]:
    """Gather pieces into packs of at most one chunk, so that tiny tensors share calls.

    Yields (tag, pack). The rows of a pack have the same dtypes, devices and tag.
    """
    pack: list[Sequence[Tensor]] = []
    room: int = 0
    kind: list[Any] = [None]
    for i, row in enumerate(rows):
        row_kind = [tags[i] if tags else None, *((t.dtype, t.device) for t in row)]
        for piece in pieces(row):
            n = piece[0].numel()
            if pack and (n > room or kind != row_kind):
                yield kind[0], pack
                pack = []
            if not pack:
                room = CHUNK_CPU if piece[0].device.type == "cpu" else CHUNK_DEVICE
                kind = row_kind
            pack.append(piece)
            room -= n
    if pack:
        yield kind[0], pack


def parts(like: Sequence[Tensor], row: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each piece with its part of a 1-d row, in the piece's shape."""
    for piece, part in zip(like, row.split([piece.numel() for piece in like]), strict=True):
        yield piece, part.view(piece.shape)


class Rows:
    """Named buffers that are reused for every chunk, because new memory costs page faults."""

    def __init__(self) -> None:
        self._rows: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, n: int | None = None) -> Tensor:
        """Return a 1-d buffer of n elements (default: as many as `like`).

        It has the device and dtype of `like`. Its former content is lost.
        """
        n = like.numel() if n is None else n
        key = (name, like.device, like.dtype)
        row = self._rows.get(key)
        if row is None or row.numel() < n:
            row = self._rows[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return row if row.numel() == n else row[:n]


def column(found: Sequence[Tensor], name: str, rows: Rows) -> Tensor:
    """Return pieces as one 1-d tensor in the named buffer; a view if there is only one piece."""
    flattened = [piece.reshape(-1) for piece in found]
    if len(flattened) == 1:
        return flattened[0]
    row = rows(name, flattened[0], sum(p.numel() for p in flattened))
    return torch.cat(flattened, out=row)


def joined(tensors: Sequence[Tensor], rows: Rows) -> Iterator[Tensor]:
    """Yield 1-d chunks of many tensors; each is overwritten when the next is made."""
    for _, pack in packs([(t,) for t in tensors]):
        yield column([piece for (piece,) in pack], "joined", rows)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a number on the CPU (reading it does not wait), elsewhere a 0-d tensor on `device`."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if device.type == value.device.type == "cpu" else value.to(device)
