"""Rules that are one weighted sum. They run on the same kernels as EBU's rule."""

from __future__ import annotations

from itertools import repeat
from operator import is_not
from typing import Any

import torch

from ..kernels.contract import STATS, Weights
from ._slots import Group
from .rule import Combined, Figures, Rule, Step, shown, weight

_DOT, _MOVED = STATS.index("dot"), STATS.index("moved_forget_only_sq")


class WeightedSum(Rule):
    """G = w_f g_f + w_r g_r + c F (theta - theta0), in one pass over all parameters.

    The weights are the numbers ``forget_weight`` and ``remember_weight``. A weight that is not
    given is 1 if `needs` has its gradient and 0 otherwise; c is 0. A subclass for another sum of
    this form overrides `weigh`.

    Args:
        needs: as for :class:`Rule`.
        numbers: as for :class:`Rule`; finite and >= 0.
    """

    fused = None

    def __init__(self, needs: tuple[str, ...] = Rule.needs, **numbers: Any) -> None:
        super().__init__(**{name: weight(name, value) for name, value in numbers.items()})
        self.needs = needs

    def weigh(self, group: Group, figures: Figures) -> tuple[float, float, float]:
        """Return w_f, w_r and c for the parameters of a group; `figures` are those of `begin`."""
        w_f, w_r = (
            group[f"ebu_{name}_weight"] if f"{name}_weight" in self.numbers else name in self.needs
            for name in ("forget", "remember")
        )
        return w_f, w_r, 0.0

    def finite(self, step: Step) -> bool:
        probe = torch.zeros((), device=step.slots[0].param.device)
        found = step.select(None, self.fused)
        for column, grads in zip(found.grads, (step.g_f, step.g_r), strict=True):
            whole = all(map(is_not, grads, repeat(None)))
            bad = found.backend.finite_probe(
                column if whole else [g for g in grads if g is not None]
            )
            if bad is not None:
                probe += bad.to(probe.device)
        step.shards.add(probe)
        return not probe.isnan()

    def combine(self, step: Step) -> Combined:
        figures = self.begin(step)

        def weigh(group: Group) -> tuple[Weights, float]:
            w_f, w_r, pull = map(float, self.weigh(group, figures))
            return Weights(w_f, w_r, penalty="full"), pull

        # an online F includes only accepted steps, so G is checked before F is updated
        made = step.combine(step.select(None, self.fused), weigh, average=False)
        return made._replace(last=(*made.last, bool(step.anchors.anchor), shown(figures)))

    def read(self, last: Any) -> dict[str, Any]:
        stats, *rest = last
        moved = stats[_MOVED : _MOVED + 4].sum()
        return super().read((torch.stack([*stats[_DOT : _DOT + 4], moved]), *rest))
