"""GU: the forget gradient without its part along the remember gradient, in Adam's metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import Step
from ..optim.rule import Slot, local, weight
from ._gramian import GramianOptimizer, OfGramian
from ._recipe import recipe


class Orthogonal(OfGramian):
    """G = w_f (g_f - k g_r) + w_r g_r with k = <f, r / h> / <r, r / h>.

    Args:
        base: the optimizer whose second moments define h, if it has any.
        conflicts_only: k = 0 where <f, r / h> >= 0.
        scope, numbers: as for `OfGramian`.
    """

    def __init__(self, base: Optimizer, conflicts_only: bool, scope: str, **numbers: Any) -> None:
        super().__init__(scope, **numbers)
        self.base = base
        self.options["conflicts_only"] = bool(conflicts_only)

    def gramians(self, step: Step, parts: Any) -> Tensor:
        def of(i: int) -> tuple[Tensor, Tensor]:
            f, r = step.gradients(i)
            h = self._metric(step.slots[i])
            if h is None:
                return f, r
            root = h.to(f).sqrt_()
            return f.div_(root), r.div_(root)

        return step.gramians(parts, of)

    def _metric(self, slot: Slot) -> Tensor | None:
        """Return h = sqrt(v_hat) + eps before the step; None if h = 1."""
        group, place = slot.place
        state = self.base.state.get(self.base.param_groups[group]["params"][place], {})
        if "exp_avg_sq" not in state or not float(state.get("step", 0)):
            return None
        beta = float(slot.group["betas"][1])
        moment = local(state["exp_avg_sq"]) / (1 - beta ** float(state["step"]))
        return moment.sqrt_().add_(float(slot.group["eps"]))

    def weights(self, gramians: Tensor, w: Tensor) -> Tensor:
        dot, square = gramians[..., 0, 1], gramians[..., 1, 1]
        k = torch.where(square > 0, dot / square, 0.0)
        if self.options["conflicts_only"]:
            k = k.clamp(max=0.0)
        return torch.stack([w[0].expand_as(k), w[1] - w[0] * k], -1)


class GU(GramianOptimizer):
    r"""GU (arXiv 2511.17100), geometric unlearning: one coefficient over all parameters,

    .. math:: G = w_f (g_f - k g_r) + w_r g_r, \qquad
              k = \frac{\langle g_f, g_r / h\rangle}{\langle g_r, g_r / h\rangle}, \qquad
              h = \sqrt{\hat v} + \epsilon

    where :math:`\hat v` is Adam's second moment before the step. So to first order, a step of Adam
    along :math:`g_f - k g_r` does not change the remember loss, in either direction. h = 1 in
    the first step, and for a base without such moments. The projection does not cover what Adam's
    momentum (betas[0] = 0 in the published runs) and decoupled weight decay add.

    The published code has max(<r, r/h>, 1e-12) in the denominator of k, which disables the
    projection for small gradients. Here k = 0 only where g_r is zero.

    Args:
        base: a torch optimizer; AMSGrad is refused.
        forget_weight, remember_weight: w_f and w_r, >= 0.
        conflicts_only: the published mode "pcgrad": k = 0 unless the two gradients oppose.
        scope: "model", or each "tensor" or "module" separately, as for :class:`PCGrad`.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        forget_weight: float = 1.0,
        remember_weight: float = 1.0,
        conflicts_only: bool = False,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if any(group.get("amsgrad") for group in getattr(base, "param_groups", ())):
            raise ValueError(
                "GU: amsgrad=True divides by the largest second moment, which is not the metric "
                "of GU; build the base with amsgrad=False"
            )
        rule = Orthogonal(
            base,
            conflicts_only,
            scope,
            forget_weight=weight("forget_weight", forget_weight),
            remember_weight=weight("remember_weight", remember_weight),
        )
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What GU learns from.
RECIPE = recipe("GU", GU, strength="forget_weight")
