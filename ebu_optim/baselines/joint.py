"""The plain sum of the two losses (eq. 2 of the EBU paper), with a weight."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .._phases import Slot
from ._rule import Figures, Rule, weight


class Joint(Rule):
    """The plain sum: G = w_f g_f + g_r. What every other rule has to beat; it has one strength.

    Args:
        base: a built torch optimizer.
        forget_weight: w_f, >= 0.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
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
            base, options={"forget_weight": weight("forget_weight", forget_weight)},
            max_grad_norm=max_grad_norm, nonfinite=nonfinite,
        )  # fmt: skip

    def rule(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        return g_f.mul_(slot.group["ebu_forget_weight"]).add_(g_r)
