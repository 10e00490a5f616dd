"""FT: descends only the remember loss."""

from __future__ import annotations

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ._recipe import recipe


class FineTune(PhasedOptimizer):
    """FT (Warnecke et al., 2021, as used for generative models): G = g_r, from theta0.

    The model forgets only because the forgotten images are no longer trained on. A loop may still
    run the forget phase: it costs time but changes nothing, because the gradients of that phase
    are dropped. A forget closure is not called.

    Args:
        base: a torch optimizer.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    needs = ("remember",)

    def __init__(
        self, base: Optimizer, *, max_grad_norm: float | None = None, nonfinite: str = "raise"
    ) -> None:
        rule = WeightedSum(self.needs)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What FT learns from.
RECIPE = recipe("FT", FineTune, forgets=None)
