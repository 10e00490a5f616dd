"""PCGrad: each gradient loses the part that opposes the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._gramian import GramianOptimizer, Weighed, surgery
from ._recipe import recipe


class One:
    """A weighting of one 2x2 Gramian for those of many parts."""

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        self.weighting = weighting

    def __call__(self, gramians: Tensor) -> Tensor:
        return torch.stack([self.weighting(g).to(g) for g in gramians])


class PCGrad(GramianOptimizer):
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
            tensor, to their two weights, as TorchJD's have it (see :class:`JacobianDescent`, which
            guards their inputs). None is PCGrad.
        scope: "model", or each "tensor" or "module" by itself; then `stats` has their number and
            that of conflicts. "module" needs a base over named parameters.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
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


#: What it learns from.
RECIPE = recipe("PCGrad", PCGrad, strength="forget_weight")
