"""From two lists of gradients to one: steps 1 to 5 of docs/method.md over a whole optimizer.

This module chooses which gradients are ranked together and which go through one call of the
kernels. The kernels do the arithmetic (`kernels.reference`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels import reference
from ..kernels.contract import Column, Columns, Update, Weights
from ._anchors import Anchors
from ._shards import Shards
from ._slots import Group, Slot, SlotList


class Selection(NamedTuple):
    """What is ranked together, and the thresholds."""

    params: Column
    grads: tuple[Column, Column]  # g_f and g_r per slot, missing ones as zeros
    taus: Tensor  # the thresholds as keys, one for every pool
    pools: tuple[list[int], list[int]]  # per slot, the pool of g_f and the pool of g_r
    nonfinite: Tensor  # counts for g_f and g_r, int64 [2]; zeros where no selection was made
    total: int  # number of scalars
    dtype: torch.dtype
    backend: Any

    def thresholds(self, inv_scale: Tensor | None) -> Tensor:
        """Return the thresholds as magnitudes, with the loss scale undone."""
        values = reference.key_to_value(self.taus, self.dtype)
        return values if inv_scale is None else values * inv_scale.to(values)


class Combined(NamedTuple):
    """The combined gradient that a rule made from a step's gradients.

    Attributes:
        grads: G per slot, in the parameter's dtype; may use the buffer of a spent gradient.
        held: per slot, the values that the base step may not change and NaN elsewhere; None if it
            may change all.
        nonfinite: how many elements of G are NaN or Inf, or any number > 0; 0-d float64.
        update_sq: |G|^2 over the whole model, 0-d float64.
        last: what `Rule.read` makes `stats` from; on the device.
    """

    grads: list[Tensor]
    held: list[Tensor] | None
    nonfinite: Tensor
    update_sq: Tensor
    last: Any


def select(
    slots: Sequence[Slot],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    *,
    granularity: str | None,
    fused: bool | None,
    shards: Shards,
) -> Selection:
    """Step 1: find the threshold of every set of gradients that is ranked together.

    The gradients are not changed.

    Args:
        slots: parameters that have at least one of the two gradients.
        g_f, g_r: gradients per slot; None counts as zero.
        granularity: "model" or "tensor"; None selects nothing and reads no gradient.
        shards: which local parts count, if parameters are sharded.
    """
    slots = slots if isinstance(slots, SlotList) else SlotList(slots)
    sizes = list(map(Tensor.numel, slots.params))
    params, full_f, full_r = (
        Column(tensors, sizes=sizes)
        for tensors in (slots.params, _filled(g_f, slots.params), _filled(g_r, slots.params))
    )
    backend = kernels.backend(params, fused)
    dtype = torch.float32
    if not kernels.walks(backend, full_f, full_r):
        dtype = reference.working_dtype([*full_f, *full_r])
    counted = [shards.numel(s) for s in slots] if shards else sizes
    total = sum(counted)
    if granularity is None:
        device, nowhere = slots[0].param.device, [0] * len(slots)
        taus = torch.full((1,), reference.key_of_nothing(dtype), device=device)
        nonfinite = torch.zeros(2, dtype=torch.int64)
        return Selection(
            params, (full_f, full_r), taus, (nowhere, nowhere), nonfinite, total, dtype, backend
        )
    ranked = _ranked(slots, counted, granularity)
    pools = [
        (grads if len(members) == len(grads) else grads.picked(members), k)
        for grads, pools in zip((full_f, full_r), ranked.pools, strict=True)
        for members, k in pools
    ]
    if shards:
        owned = [
            [shards.counts(slots.keys[i]) for i in members] for members, _ in chain(*ranked.pools)
        ]
        taus, nonfinite = shards.select(backend, pools, owned, dtype)
    else:
        taus, nonfinite = backend.select(pools, dtype)
    both = nonfinite
    if len(pools) != 2:  # not exactly one pool per gradient
        both = torch.stack([part.sum() for part in nonfinite.split([*map(len, ranked.pools)])])
    return Selection(params, (full_f, full_r), taus, ranked.of_slot, both, total, dtype, backend)


def combine(
    slots: SlotList,
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    selection: Selection,
    anchors: Anchors,
    *,
    weigh: Callable[[Group], tuple[Weights, float]],
    inv_scale: Tensor | None,
    shards: Shards,
    freeze: bool = False,
    average: bool = True,
    counted: bool = True,
) -> Combined:
    """Steps 2 to 5: write G in place of g_r (or of g_f where g_r is None).

    Args:
        weigh: returns the weights and the strength of the penalty in a parameter group.
        freeze: keep the values that ``unrelated="freeze"`` has to restore.
        average: update an online F. If False, F and g_r are kept, and G replaces g_f.
        counted: also compute the statistics that do not describe G, see `Update`.

    Returns:
        The combined gradient; `last` is the `STATS` over all processes and the number of scalars.
    """
    params, (full_f, full_r), taus, (pool_f, pool_r), _, total, dtype, backend = selection
    online = anchors.mode == "online" and anchors.active
    out, first, second = full_r, g_r, g_f
    if online and not average:
        out, first, second = full_f, g_f, [None] * len(slots)
    if any(map(is_, first, repeat(None))):
        spent = (b if a is None else a for a, b in zip(first, second, strict=True))
        out = Column(
            torch.empty_like(p) if g is None else g
            for g, p in zip(spent, slots.params, strict=True)
        )
    held: list[Tensor] | None = None
    if freeze:
        # the buffer of the spent forget gradient holds the old values
        held = [
            f
            if f is not None and f is not o and f.dtype == s.param.dtype
            else torch.empty_like(s.param)
            for f, o, s in zip(g_f, out, slots, strict=True)
        ]
    stats = torch.zeros(len(reference.STATS), dtype=torch.float64, device=slots[0].param.device)
    scale = anchors.scale(shards)
    device = stats.device
    if isinstance(scale, Tensor):
        scale = scale.to(device)
    theta0, fishers = anchors.columns(slots)
    whole = Columns(
        params,
        full_f,
        full_r,
        theta0,
        fishers,
        out,
        Column(held or [None] * len(slots)),
        pool_f,
        pool_r,
    )
    for rows, ours in _buckets(slots, theta0, fishers, anchors, shards, params.sizes):
        slot = slots[rows[0]]
        columns = whole.rows(rows)
        weights, gamma = weigh(slot.group)
        share = anchors.online_weight(slot.key) if average else None
        how = Update(weights, scale * gamma, share, inv_scale, dtype, counted)
        # the statistics of a part that another process counts are discarded
        backend.combine(columns, taus, how, stats if ours else torch.zeros_like(stats))
    shards.add(stats)
    if online and average:
        anchors.counted(slots, stats[_AT["fisher_sum"]] / total)
    return Combined(
        out, held, stats[_AT["update_nonfinite"]], stats[_AT["update_sq"]], (stats, total)
    )


_AT = {name: i for i, name in enumerate(reference.STATS)}


def _filled(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> Sequence[Any]:
    if all(map(is_not, grads, repeat(None))):
        return grads
    return [
        p.detach().new_zeros(()).expand(p.shape) if g is None else g
        for g, p in zip(grads, params, strict=True)
    ]


class _Ranked(NamedTuple):
    """Which slots are ranked together, for g_f and for g_r.

    Attributes:
        pools: for g_f and for g_r, the members of each pool and the rank of its threshold.
        of_slot: for g_f and for g_r, the pool of each slot; numbers continue from g_f to g_r.
    """

    pools: tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]
    of_slot: tuple[list[int], list[int]]


def _ranked(slots: SlotList, sizes: list[int], granularity: str) -> _Ranked:
    pairs = [g["ebu_delta"] for g in slots.groups]
    pairs = [tuple(map(float, d if isinstance(d, (tuple, list)) else (d, d))) for d in pairs]

    def make() -> _Ranked:
        forget, remember = (
            _pools(slots, sizes, deltas, granularity) for deltas in zip(*pairs, strict=True)
        )
        of_slot = [0] * len(slots), [0] * len(slots)
        for pools, of, first in ((forget, of_slot[0], 0), (remember, of_slot[1], len(forget))):
            for number, (members, _) in enumerate(pools, first):
                for i in members:
                    of[i] = number
        return _Ranked((forget, remember), of_slot)

    return slots.made("ranked", (sizes, pairs, granularity), make)


def _pools(
    slots: SlotList, sizes: Sequence[int], deltas: Sequence[float], granularity: str
) -> list[tuple[list[int], int]]:
    pools: dict[Any, list[int]] = {}
    for i, (size, group) in enumerate(zip(sizes, slots.group_of, strict=True)):
        if size:
            pools.setdefault(i if granularity == "tensor" else deltas[group], []).append(i)
    found = []
    for members in pools.values():
        n, delta = sum(sizes[i] for i in members), deltas[slots.group_of[members[0]]]
        found.append((members, max(1, math.floor(delta * n + 0.5))))
    return found


def _buckets(
    slots: SlotList,
    theta0: Sequence[Tensor | None],
    fishers: Sequence[Tensor | None],
    anchors: Anchors,
    shards: Shards,
    sizes: list[int],
) -> list[tuple[list[int], bool]]:
    """Group the slots that go through one call of the kernels.

    They share their parameter group and their count of squares. The bool says whether this
    process counts the statistics of these slots.
    """
    counts = anchors.counts(slots)
    # Equal counts rise together and stay equal; only differing counts split the slots.
    apart = counts if len(set(counts)) > 1 else None
    owned = [shards.counts(key) for key in slots.keys] if shards else [True] * len(slots)
    kinds = [list(map(type, column)) for column in (theta0, fishers)]  # NoneType if missing

    def make() -> list[tuple[list[int], bool]]:
        buckets: dict[Any, list[int]] = {}
        for i, kind in enumerate(zip(slots.group_of, *kinds, counts, owned, strict=True)):
            if sizes[i]:
                buckets.setdefault(kind, []).append(i)
        return [(members, kind[-1]) for kind, members in buckets.items()]

    return slots.made("buckets", (sizes, kinds, apart, owned), make)
