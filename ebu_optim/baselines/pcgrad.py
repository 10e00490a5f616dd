"""PCGrad: each gradient loses the part that opposes the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import PhasedOptimizer, Step, WeightedSum
from ..optim.rule import Figures
from ._recipe import recipe


class Weighted(WeightedSum):
    """Two weights from the Gramian of (w_f g_f, g_r), over all parameters as one vector.

    Args:
        forget_weight: w_f, >= 0.
        weighting: from the 2x2 Gramian, float64, to the two weights.
    """

    def __init__(self, forget_weight: float, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__(forget_weight=forget_weight)
        self.weighting = weighting

    def begin(self, step: Step) -> Figures:
        w = step.slots[0].group["ebu_forget_weight"]
        dot = step.dot * w
        gramian = torch.stack([step.forget_sq * w**2, dot, dot, step.remember_sq]).view(2, 2)
        weights = self.weighting(gramian)
        return {"forget_weight": weights[0] * w, "remember_weight": weights[1]}

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        return figures["forget_weight"], figures["remember_weight"], 0.0


class PCGrad(PhasedOptimizer):
    r"""Gradient surgery (Yu et al., 2020, Algorithm 1) for the two losses.

    Where :math:`\langle g_f, g_r \rangle < 0` each is projected onto the normal plane of the other,
    over all parameters as one vector, and the two are summed:

    .. math:: G = \left(1 - \frac{\langle g_f, g_r\rangle}{|g_f|^2}\right) g_f
              + \left(1 - \frac{\langle g_f, g_r\rangle}{|g_r|^2}\right) g_r

    else G = g_f + g_r. With two tasks the order of projection, which the algorithm draws at random,
    makes no difference. `stats` has the two weights.

    Args:
        base: a built torch optimizer.
        forget_weight: w_f >= 0: the loss is scaled by it before anything else.
        weighting: another rule of this kind: from the 2x2 Gramian of (w_f g_f, g_r), a float64
            tensor, to their two weights. TorchJD's have this form: ``UPGradWeighting()``,
            ``MGDAWeighting()``, ... (``pip install torchjd``; some draw from torch's global
            stream). None is PCGrad.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        forget_weight: float = 1.0,
        weighting: Callable[[Tensor], Tensor] | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base, Weighted(forget_weight, weighting or surgery),
            max_grad_norm=max_grad_norm, nonfinite=nonfinite,
        )  # fmt: skip
        if len({group["ebu_forget_weight"] for group in self.param_groups}) > 1:
            raise ValueError("PCGrad needs one forget_weight: it projects over all parameters")


#: What it learns from.
RECIPE = recipe("PCGrad", PCGrad, strength="forget_weight")


def surgery(gramian: Tensor) -> Tensor:
    """PCGrad's two weights from the Gramian [[f.f, f.r], [f.r, r.r]]."""
    dot = gramian[0, 1]
    # an opposing gradient is not zero, so neither square is where dot < 0
    return torch.where(dot < 0, 1 - dot / gramian.diagonal(), 1.0)
