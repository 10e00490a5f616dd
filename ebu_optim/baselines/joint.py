"""The plain sum of the two losses (eq. 2 of the EBU paper), with a weight."""

from __future__ import annotations

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ._recipe import recipe


class Joint(PhasedOptimizer):
    """The plain sum: G = w_f g_f + g_r. Every other rule has to beat it; it has one strength.

    Args:
        base: a torch optimizer.
        forget_weight: w_f, >= 0.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        forget_weight: float = 1.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base,
            WeightedSum(forget_weight=forget_weight),
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )


#: What the plain sum learns from.
RECIPE = recipe("plain sum", Joint, strength="forget_weight")
