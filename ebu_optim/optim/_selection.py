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

from .. import kernels
from ..kernels import reference
from ..kernels.contract import Columns, Update
from . import _checks
from ._anchors import Anchors
from ._shards import Shards, local
from ._slots import Slot


class Selection(NamedTuple):
    """What is ranked together, and the thresholds of it."""

    grads: tuple[list[Tensor], list[Tensor]]  # g_f and g_r per slot, missing ones as zeros
    taus: Tensor  # keys, one for every pool
    pools: tuple[list[int], list[int]]  # per slot, of g_f and of g_r
    nonfinite: Tensor  # of g_f and of g_r, int64 [2]
    total: int  # scalars
    dtype: torch.dtype
    backend: Any


def select(
    slots: Sequence[Slot],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    *,
    granularity: str,
    fused: bool | None,
    shards: Shards,
) -> Selection:
    """Step 1: the threshold of every set of gradients that is ranked together. Changes nothing.

    Args:
        slots: parameters that have at least one of the two gradients.
        g_f, g_r: per slot; None counts as zero.
        shards: where the parameters are parts of larger ones, how the parts count together.
    """
    full_f = [_or_zero(g, s.param) for g, s in zip(g_f, slots, strict=True)]
    full_r = [_or_zero(g, s.param) for g, s in zip(g_r, slots, strict=True)]
    backend = kernels.backend([s.param for s in slots], fused)
    dtype = reference.working_dtype([*full_f, *full_r])
    sizes = [shards.numel(s) for s in slots]
    pools: list[tuple[list[int], int]] = []  # members, rank
    of_slot: tuple[list[int], list[int]] = ([0] * len(slots), [0] * len(slots))
    for which in (0, 1):
        for members, k in _pools(slots, sizes, which, granularity):
            for i in members:
                of_slot[which][i] = len(pools)
            pools.append((members, k))
        if which == 0:
            forget_pools = len(pools)
    ranked = [
        ([(full_f if j < forget_pools else full_r)[i] for i in members], k)
        for j, (members, k) in enumerate(pools)
    ]
    if shards:
        owned = [[shards.counts(slots[i].key) for i in members] for members, _ in pools]
        taus, nonfinite = shards.select(backend, ranked, owned, dtype)
    else:
        taus, nonfinite = backend.select(ranked, dtype)
    both = torch.stack([nonfinite[:forget_pools].sum(), nonfinite[forget_pools:].sum()])
    return Selection((full_f, full_r), taus, of_slot, both, sum(sizes), dtype, backend)


def combine(
    slots: Sequence[Slot],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    selection: Selection,
    anchors: Anchors,
    *,
    penalty: str,
    update: str,
    unrelated: str,
    terms: Sequence[str],
    inv_scale: Tensor | None,
    shards: Shards,
) -> tuple[list[Tensor], list[Tensor] | None, Tensor, Tensor]:
    """Steps 2 to 5: G in place of g_r (or of g_f where g_r is None); an online F is updated.

    Returns:
        G per slot; what ``unrelated="freeze"`` has to put back, or None; the `STATS` over all
        processes; the thresholds as magnitudes, loss scale undone.
    """
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
    (full_f, full_r), taus, (pool_f, pool_r), _, total, dtype, backend = selection
    stats = torch.zeros(len(reference.STATS), dtype=torch.float64, device=slots[0].param.device)
    uncounted = torch.zeros_like(stats)  # of what another process counts
    scale = anchors.scale(shards)
    device = stats.device
    if isinstance(scale, Tensor):
        scale = scale.to(device)
    for rows, counted in _buckets(slots, anchors, shards):
        first = slots[rows[0]]
        fishers = [anchors.fisher.get(slots[i].key) if anchors.active else None for i in rows]
        columns = Columns(
            params=[slots[i].param for i in rows],
            g_f=[full_f[i] for i in rows],
            g_r=[full_r[i] for i in rows],
            anchors=[local(anchors.anchor.get(slots[i].key)) for i in rows],
            fishers=[local(f) for f in fishers],
            out=[out[i] for i in rows],
            held=[held[i] if held is not None else None for i in rows],
            pool_f=[pool_f[i] for i in rows],
            pool_r=[pool_r[i] for i in rows],
        )
        how = Update(
            alpha=float(first.group["ebu_alpha"]),
            gamma=scale * float(first.group["ebu_gamma"]),
            penalty=penalty,
            update=update,
            terms=tuple(t in terms for t in _checks.TERMS),  # type: ignore[arg-type]
            online=anchors.online_weight(first.key),
            inv_scale=inv_scale,
            dtype=dtype,
        )
        backend.combine(columns, taus, how, stats if counted else uncounted)
    shards.add(stats)
    if anchors.mode == "online" and anchors.active:
        anchors.counted((s.key for s in slots), stats[_AT["fisher_sum"]] / total)
    values = reference.key_to_value(taus, dtype)
    if inv_scale is not None:
        values = values * inv_scale.to(values)
    return out, held, stats, values


_AT = {name: i for i, name in enumerate(reference.STATS)}


def _or_zero(grad: Tensor | None, p: Tensor) -> Tensor:
    return p.detach().new_zeros(()).expand(p.shape) if grad is None else grad


def _pools(
    slots: Sequence[Slot], sizes: Sequence[int], which: int, granularity: str
) -> list[tuple[list[int], int]]:
    """The slots that are ranked together, and the rank of their threshold."""
    deltas = [s.group["ebu_delta"] for s in slots]
    deltas = [d[which] if isinstance(d, (tuple, list)) else d for d in deltas]
    pools: dict[Any, list[int]] = {}
    for i, (size, d) in enumerate(zip(sizes, deltas, strict=True)):
        if size:
            pools.setdefault(i if granularity == "tensor" else float(d), []).append(i)
    found = []
    for members in pools.values():
        n = sum(sizes[i] for i in members)
        found.append((members, max(1, math.floor(deltas[members[0]] * n + 0.5))))
    return found


def _buckets(
    slots: Sequence[Slot], anchors: Anchors, shards: Shards
) -> list[tuple[list[int], bool]]:
    """Slots that share their group and count of squares go through one call; and whether this
    process is the one that counts them."""
    buckets: dict[Any, list[int]] = {}
    for i, s in enumerate(slots):
        if s.param.numel():
            online = anchors.online_weight(s.key)
            held = (s.key in anchors.anchor, s.key in anchors.fisher)
            buckets.setdefault((s.place[0], held, online, shards.counts(s.key)), []).append(i)
    return [(members, kind[-1]) for kind, members in buckets.items()]
