"""GA: ascends the loss on what is to be forgotten."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ..optim.rule import Figures
from ._recipe import recipe


class Ascent(WeightedSum):
    """G = -g_f + w_r g_r; with w_r = 0 the remember phase is not needed.

    Args:
        remember_weight: w_r, >= 0.
    """

    def __init__(self, remember_weight: float) -> None:
        super().__init__(("forget",), remember_weight=remember_weight)
        if self.numbers["remember_weight"] > 0:
            self.needs = ("forget", "remember")

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        return -1.0, group["ebu_remember_weight"], 0.0


class GradientAscent(PhasedOptimizer):
    """GA (Thudi et al., 2022): G = -g_f, and with ``remember_weight`` G = -g_f + w_r g_r.

    The forget loss is the ordinary loss on the forgotten class's *own* images, not on a surrogate;
    this optimizer changes its sign. Without a remember loss (the default, as in the EBU paper)
    the model diverges sooner or later, and loses every class. SalUn's code adds a remember loss.

    Args:
        base: a torch optimizer.
        remember_weight: w_r, >= 0; with 0 the remember phase is not needed and is dropped.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    needs = ("forget",)

    def __init__(
        self,
        base: Optimizer,
        *,
        remember_weight: float = 0.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base, Ascent(remember_weight), max_grad_norm=max_grad_norm, nonfinite=nonfinite
        )


#: What GA learns from.
RECIPE = recipe("GA", GradientAscent, forgets="own")
