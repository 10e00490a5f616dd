"""Ways to do the kernels' work: how ours are called, and what else does it, on a CPU or a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebu_optim.kernels import reference
from ebu_optim.kernels.contract import Columns, Update, Weights

ALPHA, DELTA, GAMMA = 0.6, 0.5, 1.0
TERMS = (True, True, True)


def rank(n: int) -> int:
    """How many of n scalars are selected."""
    return max(1, math.floor(DELTA * n + 0.5))


# -- selection: the k-th largest magnitude of a list of gradients ---------------------------------


def engine(module: Any, grads: Sequence[Tensor], k: int) -> Tensor:
    """Ours: `module` is a backend of the package."""
    keys, _ = module.select([(grads, k)], torch.float32)
    return reference.key_to_value(keys[0], torch.float32)


def joined(grads: Sequence[Tensor]) -> Tensor:
    flat = [g.flatten() for g in grads]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def magnitudes(grads: Sequence[Tensor]) -> Tensor:
    return joined([g.abs() for g in grads])


def kthvalue(grads: Sequence[Tensor], k: int) -> Tensor:
    x = magnitudes(grads)
    return x.kthvalue(x.numel() - k + 1).values


def topk(grads: Sequence[Tensor], k: int) -> Tensor:
    return magnitudes(grads).topk(k, sorted=False).values.min()


def full_sort(grads: Sequence[Tensor], k: int) -> Tensor:
    return magnitudes(grads).sort().values[-k]


def ranks(grads: Sequence[Tensor], k: int) -> Tensor:
    """The mask by argsort of argsort, as published code has it; its smallest selected value."""
    x = magnitudes(grads)
    order = x.argsort().argsort()
    return torch.where(order >= x.numel() - k, x, math.inf).min()


def partition(grads: Sequence[Tensor], k: int) -> Tensor:
    """NumPy's, in place on the magnitudes."""
    x = magnitudes(grads)
    x.numpy().partition(x.numel() - k)
    return x[-k]


def bisection(grads: Sequence[Tensor], k: int) -> Tensor:
    """31 passes, one for each bit of the key, without a host sync."""
    u = reference.keys(joined(grads), torch.float32)
    key = torch.zeros((), dtype=torch.int64, device=u.device)
    for bit in range(30, -1, -1):
        trial = key | (1 << bit)
        key = torch.where((u >= trial).sum() >= k, trial, key)
    return reference.key_to_value(key, torch.float32)


SELECTION: dict[str, Callable[[Sequence[Tensor], int], Tensor]] = {
    "torch.kthvalue": kthvalue,
    "torch.topk": topk,
    "torch.sort": full_sort,
    "argsort of argsort": ranks,
    "bit bisection": bisection,
}


# -- combination: "added" with the partial penalty -------------------------------------------------


def combine(
    module: Any, x: dict[str, Any], out: Sequence[Tensor], keys: Tensor, **options: Any
) -> Tensor:
    """Ours: G into `out`; x has the columns params, g_f, g_r, anchors and fishers."""
    stats = torch.zeros(len(reference.STATS), dtype=torch.float64, device=keys.device)
    options = {"online": None, "inv_scale": None, "gamma": GAMMA} | options
    columns = Columns(
        x["params"],
        x["g_f"],
        x["g_r"],
        x["anchors"],
        x["fishers"],
        out,
        [None] * len(out),
        [0] * len(out),
        [1] * len(out),
    )
    weights = Weights.reading(
        alpha=ALPHA, penalty="partial", update=options.pop("update", "added"), terms=TERMS
    )
    module.combine(columns, keys, Update(weights, dtype=torch.float32, **options), stats)
    return stats


def chain(
    theta: Tensor,
    f: Tensor,
    r: Tensor,
    anchor: Tensor,
    fisher: Tensor,
    tau_f: Tensor,
    tau_r: Tensor,
    gamma: float = GAMMA,
) -> Tensor:
    """What one writes first, on values; for one tensor."""
    m_f, m_r = (f.abs() >= tau_f) & (f != 0), (r.abs() >= tau_r) & (r != 0)
    both = m_f & m_r
    penalty = torch.where(m_r & ~m_f, gamma * fisher * (theta.detach() - anchor), 0.0)
    blend = torch.where(both, ALPHA * f + (1 - ALPHA) * r, torch.where(m_f, f, 0.0))
    return f + (r + penalty) + blend


def formula(
    theta: Tensor, f: Tensor, r: Tensor, anchor: Tensor, fisher: Tensor, taus: Tensor, out: Tensor
) -> None:
    """The same, on keys, into `out` and without sums: a text for torch.compile."""
    m_f = (reference.keys(f, torch.float32) >= taus[0]).float()
    m_r = (reference.keys(r, torch.float32) >= taus[1]).float()
    f, r = f.float(), r.float()
    p = GAMMA * fisher * (theta.float() - anchor.float())
    both = m_f * m_r
    out.copy_(f + r + (m_r - both) * p + m_f * f + (1 - ALPHA) * both * (r - f))


def pcgrad(g_f: Sequence[Tensor], g_r: Sequence[Tensor]) -> list[Tensor]:
    """PCGrad of two gradients (Yu et al. 2020): each without its part against the other."""
    dot, sq_f, sq_r = (
        sum(torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True))
        for left, right in ((g_f, g_r), (g_f, g_f), (g_r, g_r))
    )
    against = dot.clamp(max=0)
    return [
        (1 - against / sq_f) * f + (1 - against / sq_r) * r for f, r in zip(g_f, g_r, strict=True)
    ]


def torchjd_pcgrad() -> Callable[[Tensor], Tensor] | str:
    """TorchJD's aggregator of a matrix [2, n], or why there is none."""
    try:
        from torchjd.aggregation import PCGrad
    except ImportError as error:
        return f"torchjd is not installed ({error})"
    return PCGrad()


# -- the whole step --------------------------------------------------------------------------------


def naive_step(params, g_f, g_r, anchors, fishers, base) -> None:  # type: ignore[no-untyped-def]
    """Two selections by cat of abs and kthvalue, the chain for every tensor, the base."""
    n = sum(p.numel() for p in params)
    tau_f, tau_r = (kthvalue(grads, rank(n)) for grads in (g_f, g_r))
    scale = GAMMA / math.sqrt(sum(float(f.sum()) for f in fishers) / n)
    for p, f, r, a, fisher in zip(params, g_f, g_r, anchors, fishers, strict=True):
        p.grad = chain(p, f, r, a, fisher, tau_f, tau_r, scale)
    base.step()
