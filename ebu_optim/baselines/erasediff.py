"""EraseDiff: descends the remember loss, and the forget loss with a multiplier."""

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
    """G = g_r + lambda g_f, where lambda is constant or max(0, eta - cos(g_r, g_f)).

    Args:
        lam: the constant, >= 0.
        eta: None for the constant; a number >= 0 makes lambda follow the cosine.
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
    :math:`\theta^K` is reached by K inner steps on the forget loss. In its code the second term is
    a constant, so the update is

    .. math:: G = g_r + \lambda g_f, \qquad
              \lambda = \max(0, \eta - \cos(g_r, g_f)) \text{ or a constant}

    The inner steps are undone before the outer step, so they seem to be wasted. But the published
    code takes them with the *same* Adam and keeps its moments. So the outer step goes in a
    direction that averages many forget gradients. ``compat="paper"`` keeps this; see `inner_steps`.

    The published forget loss for DDPM is denoising of the class's own images with noise that is
    *uniform* in [0, 1): ``denoising_loss(model, x, c, scheduler, noise=torch.rand_like(x))``. For
    Stable Diffusion it is ``relabel_loss``.

    Args:
        base: a torch optimizer.
        lam: the constant multiplier (0.1 is the published default), >= 0.
        eta: if given, lambda follows the cosine instead, over all parameters as one vector.
        compat: "paper" allows `inner_steps`.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
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
        """Take the published code's inner steps; afterwards restore the weights.

        Each step runs the base on an unclipped forget gradient. The base's moments are not
        restored.

        Args:
            closures: each runs forward and backward of the forget loss on one batch. The published
                code makes K = 2 passes over the forget set before every outer pass.

        Returns:
            What the closures returned.

        Raises:
            RuntimeError: ``compat="paper"`` is not set, so the steps would change nothing; or a
                step has begun.
        """
        if not self._paper:
            raise RuntimeError(
                'inner_steps: only compat="paper" keeps the base\'s moments, and without them '
                'undone steps change nothing; leave them out, or use compat="paper"'
            )
        if self._phases.done or self._phases.active:
            raise RuntimeError("inner_steps: a step has begun; call it between steps")
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


#: What EraseDiff learns from.
RECIPE = recipe("EraseDiff", EraseDiff, strength="lam", forgets="own", noise="uniform")


_paper = compat  # the constructor's argument hides the name
