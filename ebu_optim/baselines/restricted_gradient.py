"""The restricted gradient: PCGrad's projections with a weight on the remember gradient."""

from __future__ import annotations

from torch.optim import Optimizer

from ._gramian import GramianOptimizer, Weighed, surgery
from ._recipe import recipe


class RestrictedGradient(GramianOptimizer):
    r"""The restricted gradient (Ko et al., 2024), as in its code:

    .. math:: G = g_f' + \lambda g_r', \qquad
              g_f' = g_f - \frac{\langle g_f, g_r\rangle}{|g_r|^2} g_r, \quad
              g_r' = g_r - \frac{\langle g_f, g_r\rangle}{|g_f|^2} g_f

    if the two gradients oppose each other, over all parameters as one vector; otherwise
    :math:`G = g_f + \lambda g_r`. It is :math:`\lambda` times PCGrad with
    :math:`w_f = 1 / \lambda`, so with Adam it is PCGrad.

    The published forget loss is the negated denoising loss on the concept's own images.

    Args:
        base: a torch optimizer.
        remember_weight: lambda >= 0; published with 1.5 for Stable Diffusion, 0.5 for CIFAR-10.
        scope: "model", or each "tensor" or "module" separately, as for :class:`PCGrad`.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        remember_weight: float = 1.5,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = Weighed(surgery, scope, remember_weight=remember_weight)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What the restricted gradient learns from.
RECIPE = recipe("restricted gradient", RestrictedGradient, strength="remember_weight")
