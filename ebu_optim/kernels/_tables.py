"""Tables of chunks for the kernels in `_triton_*.py`: where their data is, as int64 arrays.

A table is made and uploaded once for a set of tensors. It is reused as long as their addresses stay
the same (gradients are kept, or the allocator returns the same memory).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Elements in a chunk; one program of a kernel processes one chunk. Larger chunks leave processors
#: idle at the end of 1e8 elements (two or three rounds of programs); smaller chunks need longer
#: tables. A power of 2, and not smaller than a tile.
CHUNK = 1 << 15
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ITEMSIZE = np.array([4, 2, 2])
_KEPT = 64

_cache: OrderedDict[Hashable, Any] = OrderedDict()
_captured: list[Any] = []


class Launch(NamedTuple):
    """Chunks of one table that share a launch; `first` is the index of the first one."""

    kinds: tuple[int, ...]
    first: int
    programs: int


def split(
    addresses: np.ndarray, kinds: np.ndarray, strides: np.ndarray, sizes: np.ndarray, chunk: int
) -> tuple[np.ndarray, ...]:
    """Split rows into chunks: the row of each, its addresses, length, and whether it is FULL.

    Args:
        addresses, kinds, strides: [columns, rows]; kind -1 means that the column is missing.
        sizes: number of elements of each row.
    """
    counts = -(-sizes // chunk)
    row = np.repeat(np.arange(len(sizes)), counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(row)) - before) * chunk
    length = np.minimum(sizes[row] - start, chunk)
    missing = kinds < 0
    step = np.where(missing, 0, ITEMSIZE[kinds] * strides)
    full = (missing | ((addresses % 16 == 0) & (strides == 1))).all(0)
    full = full[row] & (length == chunk) & (chunk % 16 == 0)
    return row, addresses[:, row] + start * step[:, row], length, full


def launches(columns: np.ndarray, first: int = 0) -> list[Launch]:
    """Return runs of equal columns of a [k, chunks] array; equal columns must be adjacent."""
    if columns.shape[1] == 0:
        return []
    cuts = np.flatnonzero((columns[:, 1:] != columns[:, :-1]).any(0)) + 1
    bounds = [0, *cuts.tolist(), columns.shape[1]]
    return [Launch(tuple(columns[:, a].tolist()), first + a, b - a) for a, b in pairwise(bounds)]


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Upload int64 arrays to the device in one copy, without waiting for it.

    Also returns the host's copy, which must be kept while the device may read it.
    """
    host = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]).astype(np.int64))
    if device.type == "cuda":
        host = host.pin_memory()
    there = host.to(device, non_blocking=True)
    parts = there.split([a.size for a in arrays])
    return [p.view(a.shape) for p, a in zip(parts, arrays)], host


def cached(key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
    """Return the cached result of `make` for this key and the current stream.

    The oldest results are dropped. Results that a CUDA graph has captured are kept for good,
    because its replays read the same memory.
    """
    capturing = False
    if device.type == "cuda":
        key = (key, torch.cuda.current_stream(device).cuda_stream)
        capturing = torch.cuda.is_current_stream_capturing()
    made = _cache.pop(key, None)
    if made is None:
        made = make()
    _cache[key] = made
    if capturing and not any(made is kept for kept in _captured):
        _captured.append(made)
    while len(_cache) > _KEPT:
        _cache.popitem(last=False)
    return made
