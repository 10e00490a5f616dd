"""ESD: the condition to forget learns the frozen model's guidance away from it."""

from __future__ import annotations

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ._recipe import recipe


class ESD(PhasedOptimizer):
    """ESD (Gandikota et al., 2023): G = g_f of ``esd_loss``; there is no remember loss.

    The published runs use Adam 1e-5 for 1000 steps (the paper's code) or 5e-5 for 200 (the newer
    code), batch size 1, without clipping.

    Args:
        base: a torch optimizer over the weights that ESD trains.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    needs = ("forget",)

    def __init__(
        self, base: Optimizer, *, max_grad_norm: float | None = None, nonfinite: str = "raise"
    ) -> None:
        rule = WeightedSum(self.needs)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What ESD learns from.
RECIPE = recipe("ESD", ESD, forgets="guidance", remembers=None, clips=False)
