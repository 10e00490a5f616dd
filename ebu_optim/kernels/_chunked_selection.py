"""Exact selection in plain torch, in chunks of fixed size (see `chunked`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pieces import Rows, flat, joined, on_device
from .contract import INF, INT, MAGNITUDE, keys

# The most candidates that are kept of one bracket (16 MiB of float32 keys).
CAPACITY = 1 << 22
SAMPLE_MIN, SAMPLE_MAX = 1 << 16, 1 << 20


@lru_cache(maxsize=8)
def _sample_plan(sizes: tuple[int, ...], count: int) -> tuple[tuple[int, Tensor], ...]:
    """Return `count` positions drawn iid over the concatenated index space, split by tensor.

    The generator has a fixed seed. The draw only guesses a bracket, and the result is exact for
    any draw. So there is no random state to save, and the user's stream is not changed.
    """
    offsets = torch.tensor((0, *sizes)).cumsum(0)
    draw = torch.randint(
        int(offsets[-1]), (count,), generator=torch.Generator().manual_seed(0x0EB0)
    )
    draw = draw.sort().values
    cuts = torch.searchsorted(draw, offsets).tolist()
    return tuple((i, draw[a:b] - offsets[i]) for i, (a, b) in enumerate(pairwise(cuts)) if b > a)


def _sample(grads: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """Return the sorted keys of about `count` elements."""
    parts = []
    for i, index in _sample_plan(tuple(g.numel() for g in grads), count):
        g = grads[i]
        views, index = flat([g]), index.to(g.device)
        drawn = views[0][index] if views is not None else g[torch.unravel_index(index, g.shape)]
        parts.append(drawn.to(grads[0].device, dtype))
    return keys(torch.cat(parts), dtype).sort().values


def _scan(
    grads: Sequence[Tensor], lo: int, hi: int, dtype: torch.dtype, collect: bool
) -> tuple[int, int, int, Tensor | None]:
    """Count keys > hi, keys in [lo, hi], and keys that are not finite.

    Also collect the keys in [lo, hi], unless there are too many.
    """
    above, inside, nonfinite = 0, 0, 0
    kept: list[Tensor] = []
    rows = Rows()
    for g in joined(grads, rows):
        bits = g.to(dtype).view(INT[dtype])
        u = torch.bitwise_and(bits, MAGNITUDE[dtype], out=rows("keys", bits))
        # on a CPU, NumPy compares and picks several times faster than torch
        v: Any = u.numpy() if u.device.type == "cpu" else u
        if v.max() >= INF[dtype]:
            nonfinite += _count(v >= INF[dtype])
        at_least, over = v >= lo, v > hi
        n_over = _count(over)
        n_inside = _count(at_least) - n_over
        above += n_over
        inside += n_inside
        if collect and n_inside and inside <= CAPACITY:
            kept.append(_pick(v, at_least ^ over))
    if not collect or inside > CAPACITY:
        return above, inside, nonfinite, None
    device = grads[0].device
    empty = torch.empty(0, dtype=INT[dtype], device=device)
    return above, inside, nonfinite, torch.cat([empty, *(x.to(device) for x in kept)])


def _count(mask: Any) -> int:
    return int(mask.count_nonzero() if isinstance(mask, Tensor) else np.count_nonzero(mask))


def _pick(values: Any, mask: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values[mask]
    return torch.from_numpy(values.take(np.flatnonzero(mask)))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Return the k-th largest of 1-d keys, 0-d int64."""
    i = values.numel() - k
    if values.device.type == "cpu":
        return torch.tensor(int(np.partition(values.numpy(), i)[i]))
    return values.kthvalue(i + 1).values.to(torch.int64)


def _guess(grads: Sequence[Tensor], k: int, n: int, dtype: torch.dtype) -> tuple[int, int]:
    """Guess a bracket of the k-th largest key, 6 standard deviations around its sample rank."""
    size = min(max(SAMPLE_MIN, math.ceil((12 * n / CAPACITY) ** 2)), SAMPLE_MAX)
    drawn = _sample(grads, size, dtype)
    share = k / n
    rank, margin = (1 - share) * size, 6 * math.sqrt(share * (1 - share) * size) + 2
    first, last = int(rank - margin), math.ceil(rank + margin)
    return (
        int(drawn[first]) if first > 0 else 0,
        int(drawn[last]) if last < size else MAGNITUDE[dtype],
    )


def select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.select`.

    A sample guesses a bracket that holds about 6/sqrt(sample) of the elements. One pass counts the
    keys above it and keeps the keys inside, which proves or refutes the guess. If the bracket is
    refuted or too full, bisection over the keys narrows it in at most 63 more passes.
    """
    device = pools[0][0][0].device
    found = [_exact(grads, k, dtype) for grads, k in pools]
    taus = torch.stack([key.to(device) for key, _ in found]).clamp_(max=INF[dtype] + 1)
    return taus, torch.tensor([nonfinite for _, nonfinite in found], device=device)


def _exact(grads: Sequence[Tensor], k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    grads = [g for g in grads if g.numel()]
    n = sum(g.numel() for g in grads)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of elements; got {k}")
    if n <= CAPACITY and len(grads) > 1:
        device = grads[0].device
        grads = [torch.cat([g.reshape(-1).to(device, dtype) for g in grads])]
    # The answer is in [low, high]; `over` keys are above that range and `count` keys inside it.
    low, high, over, count = 0, MAGNITUDE[dtype], 0, n
    lo, hi = _guess(grads, k, n, dtype) if n > SAMPLE_MIN * 4 else (low, high)
    nonfinite = 0
    while low < high:
        above, inside, nonfinite, kept = _scan(grads, lo, hi, dtype, collect=lo < hi)
        if above >= k:
            low, count = hi + 1, above - over
        elif above + inside < k:
            high, over, count = lo - 1, above + inside, over + count - above - inside
        elif kept is not None:
            return _kth_largest(kept, k - above), nonfinite
        else:
            low, high, over, count = lo, hi, above, inside
        lo, hi = low, high if count <= CAPACITY else (low + high) // 2
    return torch.tensor(low, dtype=torch.int64, device=grads[0].device), nonfinite


def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.histogram`."""
    grads = [g for g in grads if g.numel()]
    device = grads[0].device if grads else torch.device("cpu")
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    rows = Rows()
    for g in joined(grads, rows):
        digits = keys(g, dtype) >> shift
        digits = digits[digits >> bits == on_device(prefix, digits.device)] & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits).to(device)
    return counts
