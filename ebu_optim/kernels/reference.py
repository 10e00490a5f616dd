"""The specification of the kernels: Algorithm 1 in plain torch, tensor by tensor.

Every faster implementation has the same functions with the same signatures. It agrees with these:
keys, masks and counts bit for bit, the combined gradient to the rounding of its dtype. They run on
any device and any floating dtype; temporaries are as large as the tensors (`chunked` bounds them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._pieces import pieces
from .chunked import finite_probe, scale  # these have only one plain form
from .contract import (
    STATS,
    Columns,
    Update,
    key_bits,
    key_of_inf,
    key_of_nothing,
    key_to_value,
    keys,
    working_dtype,
)

__all__ = [
    "STATS",
    "combine",
    "finite_probe",
    "histogram",
    "key_bits",
    "key_of_inf",
    "key_of_nothing",
    "key_to_value",
    "keys",
    "pieces",
    "restore",
    "scale",
    "select",
    "working_dtype",
]


def select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the key of the exact k-th largest abs(g) of every pool (method.md, step 1).

    Args:
        pools: gradients that are ranked together (dense real tensors, any shapes, layouts and
            floating dtypes; n elements in all) and the rank k, 1 <= k <= n.
        dtype: `working_dtype` of the tensors (or wider).

    Returns:
        The keys, at most the key of Inf plus 1, so that all NaN are tied, whatever their bits;
        and how many elements of the pool are NaN or Inf. Both are int64, one value per pool, on
        the device of the first tensor.

    Raises:
        ValueError: k is not in 1..n.
    """
    device, inf = pools[0][0][0].device, key_of_inf(dtype)
    taus, nonfinite = [], []
    for grads, k in pools:
        u = torch.cat([keys(g, dtype).flatten().to(device) for g in grads])
        if not 1 <= k <= len(u):
            raise ValueError(f"k must be in 1..{len(u)}, the number of elements; got {k}")
        taus.append(u.kthvalue(len(u) - k + 1).values)
        nonfinite.append((u >= inf).sum())
    return torch.stack(taus).to(torch.int64).clamp_(max=inf + 1), torch.stack(nonfinite)


def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """Count, for each next digit, the keys that begin with `prefix`.

    This is one pass of a radix selection. Counts of parts add up, so several processes can find one
    threshold together (`ebu_optim/optim/_shards.py`).

    Args:
        grads: dense real tensors; may be empty.
        prefix: the bits above the digit, key >> (shift + bits); an int or a 0-d tensor.
        shift, bits: the digit is (key >> shift) & (2**bits - 1).
        dtype: working dtype.

    Returns:
        int64 [2**bits] on the device of the first tensor (on the CPU if there is none).
    """
    device = grads[0].device if grads else torch.device("cpu")
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    for g in grads:
        u = keys(g, dtype).flatten().to(device)
        digits = (u >> shift)[u >> shift >> bits == int(prefix)] & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits)
    return counts


def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """Steps 2 to 5 of method.md: regions, penalty, modulation and combination.

    They are computed as one sum (`contract.Weights`). Masks are 0 and 1 and are multiplied, not
    used to choose, so G is not finite where a gradient is not finite.

    Args:
        columns: what is read and written in place.
        taus: the keys that `select` returned; a key of 0 selects every non-zero scalar,
            `key_of_nothing` selects none.
        how: the options.
        stats: float64 vector of len(STATS); the sums are added to it.
    """
    dtype, taus = how.dtype, taus.clamp(min=1)  # zeros are never selected
    on_f, on_r, on_m, on_only_r, blend, penalty = how.weights
    for theta, g_f, g_r, theta0, F, out, held, pool_f, pool_r in zip(*columns, strict=True):
        f, r = g_f.to(dtype), g_r.to(dtype)
        opposed = f.signbit() != r.signbit()
        m_f = (keys(f, dtype) >= taus[pool_f].to(f.device)).to(dtype)
        m_r = (keys(r, dtype) >= taus[pool_r].to(f.device)).to(dtype)
        if how.inv_scale is not None:
            f, r = (g * how.inv_scale.to(g.device, g.dtype) for g in (f, r))
        overlap = m_f * m_r
        only_f, only_r, unrelated = m_f - overlap, m_r - overlap, (1 - m_f) * (1 - m_r)

        G = on_f * f + on_r * r + on_m * m_f * f + on_only_r * only_r * r
        # in this order, alpha = 0 gives exactly g_r
        G = G - blend * overlap * f + blend * overlap * r
        # penalty, eqs. 8 and 9
        moved = theta.to(dtype) - theta0.to(f.device, dtype) if theta0 is not None else 0 * m_f
        if theta0 is not None and F is not None and penalty != "none":
            p = how.gamma * F.to(f.device, dtype) * moved
            G = G + (p if penalty == "full" else only_r * p)

        new = None
        if F is not None and how.online is not None:
            wide = F.to(f.device, torch.float64 if F.dtype == torch.float64 else dtype)
            new = torch.lerp(wide, (r * r).to(wide), how.online).to(F.dtype)
        regions = (only_f, only_r, overlap, unrelated)
        summed = [m_f, m_r, overlap, overlap * opposed]
        summed += [a.double() * b.double() for a, b in ((f, r), (f, f), (r, r), (G, G))]
        summed += [moved.double() ** 2 * region for region in regions]
        summed += [torch.zeros(()) if new is None else new, ~G.to(out.dtype).isfinite()]
        stats += torch.stack([x.sum(dtype=torch.float64).to(stats.device) for x in summed])

        # written last, because out and held may be the gradients
        if F is not None and new is not None:
            F.copy_(new)
        if held is not None:
            held.copy_(theta.masked_fill(unrelated == 0, math.nan))
        out.copy_(G)


def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """Restore the scalars that `combine` kept in `held` (those that are not NaN)."""
    for theta, kept in zip(params, held, strict=True):
        if kept is not None:
            theta.copy_(torch.where(kept.isnan(), theta, kept))
