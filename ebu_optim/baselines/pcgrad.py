"""PCGrad: each gradient loses the part that opposes the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._gramian import GramianOptimizer, Weighed, surgery
from ._recipe import recipe


class One:
    """Applies a weighting of one 2x2 Gramian to the Gramians of many parts."""

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        self.weighting = weighting

    def __call__(self, gramians: Tensor) -> Tensor:
        return torch.stack([self.weighting(g).to(g) for g in gramians])


class PCGrad(GramianOptimizer):
    r"""Gradient surgery (Yu et al., 2020, Algorithm 1) for the two losses.

    If :math:`\langle g_f, g_r \rangle < 0`, each gradient is projected onto the normal plane of the
    other one, over all parameters as one vector, and the two are summed:

    .. math:: G = \left(1 - \frac{\langle g_f, g_r\rangle}{|g_f|^2}\right) g_f
              + \left(1 - \frac{\langle g_f, g_r\rangle}{|g_r|^2}\right) g_r

    Otherwise G = g_f + g_r. The order of the projections is random in the algorithm, which makes no
    difference with two tasks. `stats` has the two weights.

    Args:
        base: a torch optimizer.
        forget_weight: w_f >= 0; the forget loss is scaled by it first.
        weighting: another weighting, which maps the 2x2 Gramian of (w_f g_f, g_r), a float64
            tensor, to the two weights, as in TorchJD (see :class:`JacobianDescent`, which
            guards their inputs). None is PCGrad.
        scope: "model", or each "tensor" or "module" separately; then `stats` has the number of
            parts and of conflicts. "module" needs a base over named parameters.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        forget_weight: float = 1.0,
        weighting: Callable[[Tensor], Tensor] | None = None,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = Weighed(
            surgery if weighting is None else One(weighting), scope, forget_weight=forget_weight
        )
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What PCGrad learns from.
RECIPE = recipe("PCGrad", PCGrad, strength="forget_weight")
