"""EraseDiff: descend the remember loss, and the forget loss with a multiplier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .._compat import compat
from ..optim import PhasedOptimizer, Step, WeightedSum
from ..optim.rule import Figures, local, weight
from ._recipe import recipe


class Multiplied(WeightedSum):
    """G = g_r + lambda g_f, lambda constant or max(0, eta - cos(g_r, g_f)).

    Args:
        lam: the constant, >= 0.
        eta: where not None, >= 0: lambda follows the cosine.
    """

    def __init__(self, lam: float, eta: float | None) -> None:
        super().__init__(lam=lam)
        self.options = {"eta": None if eta is None else weight("eta", eta)}

    def begin(self, step: Step) -> Figures:
        eta = self.options["eta"]
        if eta is None:
            return {}
        norms = step.forget_sq.sqrt() * step.remember_sq.sqrt()
        lam = (eta - step.dot / (norms + 1e-8)).clamp(min=0.0)
        return {"lam": torch.where(step.forget_sq > 0, lam, 0.0)}

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        return figures.get("lam", group["ebu_lam"]), 1.0, 0.0


class EraseDiff(PhasedOptimizer):
    r"""EraseDiff (Wu et al., 2024): a bi-level problem in its first-order form.

    The paper constrains the remember loss by :math:`q(\theta) = L_f(\theta) - L_f(\theta^K)`, where
    :math:`\theta^K` is K inner steps on the forget loss away. In its code the second term is a
    constant, so the update is

    .. math:: G = g_r + \lambda g_f, \qquad
              \lambda = \max(0, \eta - \cos(g_r, g_f)) \text{ or a constant}

    and the inner steps, undone before the outer one, are a waste: but for one trap. They are taken
    with the *same* Adam, whose moments stay, so the outer step goes in a direction in which many
    forget gradients have been averaged. ``compat="paper"`` keeps that; see `inner_steps`.

    Its forget loss for DDPM is denoising of the class's own images where the noise is *uniform* in
    [0, 1): ``denoising_loss(model, x, c, scheduler, noise=torch.rand_like(x))``; for Stable
    Diffusion it is ``relabel_loss``.

    Args:
        base: a built torch optimizer.
        lam: the constant multiplier (0.1 is the published default), >= 0.
        eta: where given, lambda follows the cosine instead, over all parameters as one vector.
        compat: "paper" allows `inner_steps`.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        lam: float = 0.1,
        eta: float | None = None,
        compat: str | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        self._paper = _paper(compat)
        super().__init__(
            base, Multiplied(lam, eta), max_grad_norm=max_grad_norm, nonfinite=nonfinite
        )

    @torch.no_grad()
    def inner_steps(self, closures: Sequence[Callable[[], Any]]) -> list[Any]:
        """The published code's inner steps: each steps the base on a forget gradient, unclipped;
        then the weights are put back and the base's moments are not.

        Args:
            closures: each runs forward and backward of the forget loss on one batch; the code takes
                K = 2 passes over the forget set before every outer pass.

        Returns:
            What the closures returned.

        Raises:
            RuntimeError: without ``compat="paper"``, where they would change nothing; or inside a
                step that is under way.
        """
        if not self._paper:
            raise RuntimeError(
                'inner_steps: without the base\'s moments, which only compat="paper" keeps, '
                "undone steps change nothing; leave them out"
            )
        if self._phases.done or self._phases.active:
            raise RuntimeError("inner_steps: call it between steps, outside the phases")
        slots = self._slots()
        before = [local(s.param).clone() for s in slots]
        losses = []
        try:
            for closure in closures:
                self._phases.discard()
                with torch.enable_grad():
                    losses.append(closure())
                self.base.step()
        finally:
            for slot, old in zip(slots, before, strict=True):
                local(slot.param).copy_(old)
            self._phases.discard()
        return losses


#: What it learns from.
RECIPE = recipe("EraseDiff", EraseDiff, strength="lam", forgets="own", noise="uniform")


_paper = compat  # the constructor's argument hides the name
