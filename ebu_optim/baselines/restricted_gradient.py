"""The restricted gradient: each gradient without what opposes the other, the kept one weighted."""

from __future__ import annotations

from torch.optim import Optimizer

from ._gramian import GramianOptimizer, Weighed, surgery
from ._recipe import recipe


class RestrictedGradient(GramianOptimizer):
    r"""The restricted gradient (Ko et al., 2024), as its code has it:

    .. math:: G = g_f' + \lambda g_r', \qquad
              g_f' = g_f - \frac{\langle g_f, g_r\rangle}{|g_r|^2} g_r, \quad
              g_r' = g_r - \frac{\langle g_f, g_r\rangle}{|g_f|^2} g_f

    where the two oppose each other, over all parameters as one vector, else
    :math:`G = g_f + \lambda g_r`. It is :math:`\lambda` times PCGrad with
    :math:`w_f = 1 / \lambda`, so under Adam it is PCGrad.

    Its forget loss is the negated denoising loss on the concept's own images.

    Args:
        base: a built torch optimizer.
        remember_weight: lambda >= 0; theirs is 1.5 for Stable Diffusion, 0.5 for CIFAR-10.
        scope: "model", or each "tensor" or "module" by itself, as of :class:`PCGrad`.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
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


#: What it learns from.
RECIPE = recipe("restricted gradient", RestrictedGradient, strength="remember_weight")
