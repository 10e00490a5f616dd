"""SAGO: for each scalar, the remember gradient where the two disagree, else the forget gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import PhasedOptimizer, Rule, Slot
from ..optim.rule import Figures, weight
from ._recipe import recipe


class SignGated(Rule):
    """G = w_r g_r where the signs of the two gradients differ, w_f g_f elsewhere.

    Args:
        forget_weight, remember_weight: w_f and w_r, >= 0.
        both: G is w_f g_f + w_r g_r where the signs agree.
    """

    def __init__(self, forget_weight: float, remember_weight: float, both: bool) -> None:
        super().__init__(
            forget_weight=weight("forget_weight", forget_weight),
            remember_weight=weight("remember_weight", remember_weight),
        )
        self.options = {"both": bool(both)}

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        # signs are compared because the product of small gradients is zero in float32
        opposed = g_f.sign() * g_r.sign() < 0
        w_f, w_r = (slot.group[f"ebu_{n}_weight"] for n in ("forget", "remember"))
        kept = g_r.mul_(w_r)
        agreed = g_f.mul_(w_f)
        return torch.where(opposed, kept, agreed + kept if self.options["both"] else agreed)


class SAGO(PhasedOptimizer):
    r"""SAGO (arXiv 2604.14808), as in its code, for each scalar

    .. math:: G_i = \begin{cases} w_r\, g_{r,i} & g_{f,i}\, g_{r,i} < 0 \\
              w_f\, g_{f,i} & \text{else} \end{cases}

    So a scalar without a forget gradient is not trained, because a product of zero counts as
    agreement.

    Args:
        base: a torch optimizer.
        forget_weight, remember_weight: w_f and w_r, >= 0; 1 and 1 in the published runs.
        both: the published variant that prefers what is kept: G is the weighted sum of both
            gradients where they agree.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        forget_weight: float = 1.0,
        remember_weight: float = 1.0,
        both: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base,
            SignGated(forget_weight, remember_weight, both),
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )


#: What SAGO learns from.
RECIPE = recipe("SAGO", SAGO, strength="remember_weight")
