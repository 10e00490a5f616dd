"""A control: EBU's update with random masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels import reference
from ..optim import PhasedOptimizer, Rule, Slot, Step, TensorMap
from ..optim.rule import Figures, Key, choice
from ._recipe import recipe


class RandomlyMasked(Rule):
    """EBU's update with random masks, tensor by tensor; see `RandomMasks`."""

    def __init__(self, penalty: str, update: str, independent: bool, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.options = {
            "penalty": choice("penalty", penalty, ("partial", "full", "none")),
            "update": choice("update", update, ("added", "replaced", "routed")),
            "independent": independent,
        }

    @property
    def penalised(self) -> bool:  # type: ignore[override]
        return self.options["penalty"] != "none"

    def begin(self, step: Step) -> Figures:
        if step.shards:
            raise TypeError(
                "RandomMasks samples whole masks, but the parameters are sharded; run this control "
                "on one process or under DistributedDataParallel"
            )
        masks = dict(
            self._independent(step) if self.options["independent"] else self._counted(step)
        )
        pairs = list(masks.values())
        n_f, n_r, both = (
            sum(int(m.sum()) for m in ms)
            for ms in ([f for f, _ in pairs], [r for _, r in pairs], [f & r for f, r in pairs])
        )
        total = sum(f.numel() for f, _ in pairs)
        return {
            "forget_selected": n_f,
            "remember_selected": n_r,
            "overlap": both,
            "overlap_lift": both * total / (n_f * n_r) if n_f * n_r else float("nan"),
            "_masks": masks,
            "_anchors": step.anchors,
            "_scale": step.anchors.scale(step.shards),
        }

    def _streams(self, step: Step, slot: Slot) -> tuple[np.random.Generator, torch.Generator]:
        # by place and not by key, because a resumed run may have other keys
        words = (int(slot.group["ebu_seed"]), step.number, *slot.place)
        counts = np.random.default_rng(words)
        seed = int(counts.integers(2**63))
        return counts, torch.Generator(slot.param.device).manual_seed(seed)

    def _independent(self, step: Step) -> Iterator[tuple[Key, tuple[Tensor, Tensor]]]:
        for slot in step.slots:
            delta = slot.group["ebu_delta"]
            pair = delta if isinstance(delta, (tuple, list)) else (delta, delta)
            _, generator = self._streams(step, slot)
            draws = (
                torch.rand(slot.param.shape, generator=generator, device=slot.param.device)
                for _ in pair
            )
            f, r = (draw < d for draw, d in zip(draws, pair, strict=True))
            yield slot.key, (f, r)

    def _counted(self, step: Step) -> Iterator[tuple[Key, tuple[Tensor, Tensor]]]:
        """Yield masks that have exactly the sizes of EBU's masks in each group."""
        found = step.select()
        left: dict[int, np.ndarray] = {}  # by group: overlap, forget only, remember only, neither
        for i, slot in enumerate(step.slots):
            m_f, m_r = (
                (reference.keys(g[i], found.dtype) >= found.taus[pool[i]].to(g[i].device))
                & (g[i] != 0)
                for g, pool in zip(found.grads, found.pools, strict=True)
            )
            n_f, n_r, both = (int(m.sum()) for m in (m_f, m_r, m_f & m_r))
            regions = np.array([both, n_f - both, n_r - both, m_f.numel() - n_f - n_r + both])
            left[slot.place[0]] = left.get(slot.place[0], np.zeros(4, np.int64)) + regions
        for slot in step.slots:
            counts, generator = self._streams(step, slot)
            p, remaining = slot.param, left[slot.place[0]]
            here = counts.multivariate_hypergeometric(remaining, p.numel(), method="marginals")
            left[slot.place[0]] = remaining - here
            both, f_only, r_only, _ = here.tolist()
            places = torch.randperm(p.numel(), generator=generator, device=p.device)
            m_f, m_r = (torch.zeros(p.numel(), dtype=torch.bool, device=p.device) for _ in "fr")
            m_f[places[: both + f_only]] = True
            m_r[places[:both]] = True
            m_r[places[both + f_only : both + f_only + r_only]] = True
            yield slot.key, (m_f.view(p.shape), m_r.view(p.shape))

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        m_f, m_r = figures["_masks"][slot.key]
        overlap, remember_only = m_f & m_r, m_r & ~m_f
        anchors, update = figures["_anchors"], self.options["update"]
        if anchors.active:
            p = anchors.pull(slot, g_r, figures["_scale"]) * slot.group["ebu_gamma"]
            full = self.options["penalty"] == "full"
            pulled = p if full else torch.where(remember_only, p, 0.0)
        else:
            pulled = torch.zeros_like(g_r)
        alpha = slot.group["ebu_alpha"]
        blend = torch.where(overlap, alpha * g_f + (1 - alpha) * g_r, g_f)
        m = torch.where(m_f, blend, 0.0)
        if update == "routed":
            return torch.where(remember_only, g_r, m) + pulled
        return (blend if update == "replaced" else g_f) + g_r + pulled + m


class RandomMasks(PhasedOptimizer):
    """EBU with random masks of the same density and the same overlap.

    Every step makes EBU's selection and counts the scalars of M_f, M_r and their overlap. The masks
    have the same counts in each group, at random places. So the gain of EBU over this control comes
    from *which* weights it selects; the rest comes from how it weighs the two gradients.

    The masks are sampled with separate generators, which depend on a seed (``ebu_seed``, in the
    groups) and the number of steps taken. Both are saved. So a resumed run is the same run, the
    user's random stream is not changed, and processes that share a process group sample the same
    masks.

    Args:
        base: a torch optimizer over parameters that are not sharded.
        alpha, delta, gamma, fisher, fisher_scale, anchor, penalty, update: as for
            :class:`~ebu_optim.EBUOptimizer`.
        seed: the seed of the masks.
        independent: True samples M_f and M_r independently, scalar by scalar, with probability
            delta; then their overlap is that of chance.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        alpha: float = 0.6,
        delta: float | tuple[float, float] = 0.5,
        gamma: float = 100.0,
        fisher: str | TensorMap | None = "online",
        fisher_scale: str = "unit",
        anchor: TensorMap | None = None,
        penalty: str = "partial",
        update: str = "added",
        seed: int = 0,
        independent: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = RandomlyMasked(
            penalty, update, independent, alpha=alpha, delta=delta, gamma=gamma, seed=int(seed)
        )
        super().__init__(
            base,
            rule,
            fisher=fisher,
            fisher_scale=fisher_scale,
            anchor=anchor,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )


#: What the control learns from.
RECIPE = recipe("random masks", RandomMasks, strength="gamma", fisher="online")
