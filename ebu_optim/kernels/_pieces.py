"""Walking over tensors in bounded pieces: what `chunked` reads at a time.

On a CPU what counts is that a chunk's buffers stay in the cache and that no operation makes or
reads a bool tensor: torch does not vectorise those, and they cost four times what a float costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# One chunk's buffers stay in the caches of a CPU core; an accelerator wants few launches.
CHUNK_CPU = 1 << 19
CHUNK_DEVICE = 1 << 22


def flat_stride(t: Tensor) -> int | None:
    """1 where the elements fill one stretch of memory in some order, 0 where all are one; else
    None."""
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
    """The columns as 1-d views in memory order, or None where their layouts differ.

    A column whose strides are all 0 (one value, expanded) goes with any layout.
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
    """Views of the same elements of every column, at most `chunk` of them at a time.

    Columns share one shape; the pieces cover each element once, in an order of no importance.
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
    """Pieces gathered into packs of at most one chunk, so that tiny tensors share their calls.

    Yields (tag, pack); the rows of a pack have the same dtypes, devices and tag.
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
    """Each piece with its part, of the piece's shape, of a 1-d row."""
    for piece, part in zip(like, row.split([piece.numel() for piece in like]), strict=True):
        yield piece, part.view(piece.shape)


class Rows:
    """Buffers by name, made once and used again for every chunk: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._rows: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, n: int | None = None) -> Tensor:
        """A 1-d buffer of n elements (as many as `like`) of the device and dtype of `like`; what it
        held before is lost."""
        n = like.numel() if n is None else n
        key = (name, like.device, like.dtype)
        row = self._rows.get(key)
        if row is None or row.numel() < n:
            row = self._rows[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return row if row.numel() == n else row[:n]


def column(found: Sequence[Tensor], name: str, rows: Rows) -> Tensor:
    """Pieces as one 1-d tensor, in the buffer of that name: a view where it is one piece."""
    flattened = [piece.reshape(-1) for piece in found]
    if len(flattened) == 1:
        return flattened[0]
    row = rows(name, flattened[0], sum(p.numel() for p in flattened))
    return torch.cat(flattened, out=row)


def joined(tensors: Sequence[Tensor], rows: Rows) -> Iterator[Tensor]:
    """Chunks of many tensors, 1-d; each is lost when the next is made."""
    for _, pack in packs([(t,) for t in tensors]):
        yield column([piece for (piece,) in pack], "joined", rows)


def on_device(value: Any, device: torch.device) -> Any:
    """On the CPU a number (reading it waits for nothing), elsewhere a 0-d tensor there."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if device.type == value.device.type == "cpu" else value.to(device)
