"""MUNBa: the two losses bargain; each loses and gains in the same proportion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._gramian import GramianOptimizer, Weighed, cosines
from ._recipe import recipe

#: The least 1 + cos. If the gradients are nearer to opposite, the update shrinks to zero.
LEAST = 1e-6


class MUNBa(GramianOptimizer):
    r"""MUNBa (Wu & Harandi, 2024): Nash's bargaining solution of the two losses, in closed form.

    The weights solve :math:`K w = 1 / w` for the Gramian K of the two gradients:

    .. math:: G = \frac{1}{\sqrt{1 + \cos(g_f, g_r)}}
              \left(\frac{g_f}{|g_f|} + \frac{g_r}{|g_r|}\right)

    over all parameters as one vector. G has the norm :math:`\sqrt 2` and the direction of the
    bisector, whatever the scale of either loss. So the learning rate is the only strength.
    1 + cos is at least 1e-6, so G tends to zero where the two gradients are opposite. If one
    gradient is zero, the other one has norm 1.

    Args:
        base: a torch optimizer.
        scope: "model", or each "tensor" or "module" separately, as for :class:`PCGrad`; then each
            part of G has the norm sqrt 2.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = Weighed(bargain, scope)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What MUNBa learns from.
RECIPE = recipe("MUNBa", MUNBa)


def bargain(gramians: Tensor) -> Tensor:
    """Return Nash's two weights from [[f.f, f.r], [f.r, r.r]], [..., 2, 2] to [..., 2]."""
    norms = gramians.diagonal(dim1=-2, dim2=-1).sqrt()
    shared = (1 + cosines(gramians)).clamp(min=LEAST).sqrt()
    return torch.where(norms > 0, 1 / (norms * shared[..., None]), 0.0)
