"""FT: descend the remember loss alone."""

from __future__ import annotations

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ._recipe import recipe


class FineTune(PhasedOptimizer):
    """FT (Warnecke et al., 2021, as used for generative models): G = g_r, from theta0.

    What it forgets it forgets because it is no longer trained on. A loop that runs the forget phase
    all the same wastes its passes and changes nothing: what that phase makes is dropped, a forget
    closure is not called.

    Args:
        base: a built torch optimizer.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
    """

    needs = ("remember",)

    def __init__(
        self, base: Optimizer, *, max_grad_norm: float | None = None, nonfinite: str = "raise"
    ) -> None:
        rule = WeightedSum(self.needs)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What it learns from.
RECIPE = recipe("FT", FineTune, forgets=None)
