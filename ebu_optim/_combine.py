"""From two lists of gradients to one: steps 1 to 5 of docs/method.md over a whole optimizer.

Chooses what is ranked together and what goes through one call of the kernels; the arithmetic is
theirs (`kernels.reference`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from ._penalty import Penalty
from ._phases import Slot
from .kernels import reference

TERMS = ("forget", "remember", "modulated")


class Combined(NamedTuple):
    """G per slot; what `unrelated="freeze"` has to put back; the figures for `stats`."""

    grads: list[Tensor]
    held: list[Tensor] | None
    last: tuple[Tensor, list[Tensor], int]


def combine(
    slots: Sequence[Slot],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    penalty: Penalty,
    *,
    update: str,
    unrelated: str,
    terms: Sequence[str],
    granularity: str,
    max_grad_norm: float | None,
    fused: bool | None,
) -> Combined:
    """G in place of g_r (or of g_f where g_r is None); an online F is updated.

    Args:
        slots: parameters that have at least one of the two gradients.
        g_f, g_r: per slot; None counts as zero.
    """
    full_f = [_or_zero(g, s.param) for g, s in zip(g_f, slots, strict=True)]
    full_r = [_or_zero(g, s.param) for g, s in zip(g_r, slots, strict=True)]
    out: list[Tensor] = [
        r if r is not None else f  # type: ignore[misc]
        for f, r in zip(g_f, g_r, strict=True)
    ]
    held: list[Tensor] | None = None
    if unrelated == "freeze":
        # the spent forget gradient holds the old values
        held = [
            f if f is not None and f is not o and f.dtype == s.param.dtype
            else torch.empty_like(s.param)
            for f, o, s in zip(g_f, out, slots, strict=True)
        ]  # fmt: skip
    backend = kernels.backend([s.param for s in slots], fused)
    dtype = reference.working_dtype([*full_f, *full_r])
    tau_f = _thresholds(backend, slots, full_f, 0, granularity, dtype)
    tau_r = _thresholds(backend, slots, full_r, 1, granularity, dtype)

    stats = torch.zeros(len(reference.STATS), dtype=torch.float64, device=slots[0].param.device)
    total = sum(s.param.numel() for s in slots)
    scale = penalty.scale()
    for rows in _buckets(slots, penalty, tau_f, tau_r):
        first = rows[0]
        group, online = slots[first].group, penalty.online_weight(slots[first].key)
        backend.combine(
            [slots[i].param for i in rows],
            [full_f[i] for i in rows],
            [full_r[i] for i in rows],
            [penalty.anchor.get(slots[i].key) for i in rows],
            [penalty.fisher.get(slots[i].key) if penalty.active else None for i in rows],
            [out[i] for i in rows],
            [held[i] if held is not None else None for i in rows],
            tau_f[first],
            tau_r[first],
            alpha=float(group["ebu_alpha"]),
            gamma=scale * float(group["ebu_gamma"]),
            penalty=penalty.kind,
            update=update,
            terms=tuple(t in terms for t in TERMS),
            online=online,
            dtype=dtype,
            stats=stats,
        )
    if penalty.mode == "online" and penalty.active:
        penalty.counted((s.key for s in slots), stats[-1] / total)
    if max_grad_norm is not None:
        norm = stats[reference.STATS.index("update_sq")].sqrt()
        reference.scale(out, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    keys = [
        reference.key_to_value(t, dtype)
        for taus in (tau_f, tau_r)
        for t in {id(t): t for t, s in zip(taus, slots, strict=True) if s.param.numel()}.values()
    ]
    return Combined(out, held, (stats, keys, total))


def _or_zero(grad: Tensor | None, p: Tensor) -> Tensor:
    return p.detach().new_zeros(()).expand(p.shape) if grad is None else grad


def _thresholds(
    backend: Any,
    slots: Sequence[Slot],
    grads: Sequence[Tensor],
    which: int,
    granularity: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The threshold key of every slot: one for all slots that are ranked together."""
    pools: dict[Any, list[int]] = {}
    deltas = [s.group["ebu_delta"] for s in slots]
    deltas = [d[which] if isinstance(d, (tuple, list)) else d for d in deltas]
    for i, d in enumerate(deltas):
        if grads[i].numel():
            pools.setdefault(i if granularity == "tensor" else float(d), []).append(i)
    taus = [torch.ones((), dtype=torch.int64, device=g.device) for g in grads]
    for members in pools.values():
        n = sum(grads[i].numel() for i in members)
        k = max(1, math.floor(deltas[members[0]] * n + 0.5))
        tau = backend.threshold([grads[i] for i in members], k, dtype)
        for i in members:
            taus[i] = tau
    return taus


def _buckets(
    slots: Sequence[Slot], penalty: Penalty, tau_f: Sequence[Tensor], tau_r: Sequence[Tensor]
) -> list[list[int]]:
    """Slots that share their group, thresholds and count of squares go through one call."""
    buckets: dict[Any, list[int]] = {}
    for i, s in enumerate(slots):
        if s.param.numel():
            online = penalty.online_weight(s.key)
            held = (s.key in penalty.anchor, s.key in penalty.fisher)
            kind = (s.key[0], held, online, id(tau_f[i]), id(tau_r[i]))
            buckets.setdefault(kind, []).append(i)
    return list(buckets.values())
