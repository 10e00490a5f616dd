"""A relearner: the forget loss also at weights from which somebody has begun to learn it again.

relearner = Relearner(unet.parameters(), steps=3, lr=3e-4)
for batch in loader:
    with opt.forget():
        forget_loss(batch).backward()
        with relearner.moved(relearn):  # some steps of relearning; put back afterwards
            forget_loss(batch).backward()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class Relearner:
    r"""Weights that were moved down the sign of the gradient of a relearning loss,

    .. math:: \theta_{j+1} = \theta_j - \eta\, \mathrm{sign}\, \nabla L_{relearn}(\theta_j), \qquad
              \theta_0 = \theta,

    which are the first steps of Adam. The forget loss is taken at :math:`\theta_m`, too, and its
    gradient there serves at :math:`\theta`: a meta-gradient of first order, as if the steps did not
    depend on the weights.

    It has no state, and samples nothing by itself. Of several processes each gives a gradient of
    its own, and all move by the sign of their sum. `moved` and `loss` must then be called by all.

    Args:
        parameters: what is trained; those that need no gradient are left out, and stay.
        steps: of the relearner.
        lr: how far each step moves each scalar.

    Raises:
        ValueError: a number that cannot be; no parameter that needs a gradient.
    """

    def __init__(self, parameters: Iterable[Tensor], *, steps: int = 3, lr: float = 3e-4) -> None:
        if steps < 1:
            raise ValueError(f"steps must be >= 1; got {steps}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite; got {lr}")
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError("parameters has none that needs a gradient: there is nothing to move")
        self.steps, self.lr = steps, lr

    @contextmanager
    def moved(self, relearn: Callable[[], Tensor], *, scale: float = 1.0) -> Iterator[None]:
        """Inside the block the weights are where the relearner has taken them. Afterwards they are
        bit for bit what they were, also if a loss raises. So a backward pass of what was computed
        inside must be inside, and one of what was computed before must come before.

        Args:
            relearn: called for each step, with a new 0-d loss each time, small where the model
                generates what is forgotten.
            scale: of the loss for its backward pass, such as GradScaler's in 16 bits.

        Raises:
            ValueError: a relearning loss that does not depend on the weights.
        """
        before = [p.detach().clone() for p in self.parameters]
        try:
            for _ in range(self.steps):
                self._step(relearn, scale)
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                for p, was in zip(self.parameters, before, strict=True):
                    p.copy_(was)
            torch.clear_autocast_cache()

    def loss(
        self,
        forget: Callable[[], Tensor],
        relearn: Callable[[], Tensor],
        *,
        scale: float = 1.0,
    ) -> Tensor:
        """The forget loss at the moved weights, to be added to others and to run backward outside.

        Args:
            forget: the 0-d forget loss.
            relearn, scale: as of `moved`; the scale is of both.

        Returns:
            0-d: the value of `forget` at the moved weights, its gradient there as that of the
            weights.

        Raises:
            ValueError: as of `moved`; a forget loss that does not depend on the weights.
        """
        with self.moved(relearn, scale=scale), torch.enable_grad():
            value = forget()
            grads = self._gradients(value, "forget", scale)
        total = value.detach()
        for p, g in zip(self.parameters, grads, strict=True):
            if g is not None:
                # 0, with the gradient g; not finite where g is not, as the loss itself would be
                total = total + ((p - p.detach()) * (g / scale)).sum()
        return total

    def _step(self, relearn: Callable[[], Tensor], scale: float) -> None:
        # the 16-bit copies that autocast keeps are of the weights before the last step
        torch.clear_autocast_cache()
        with torch.enable_grad():
            grads = self._gradients(relearn(), "relearn", scale)
        joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        with torch.no_grad():
            for p, g in zip(self.parameters, grads, strict=True):
                if g is None:
                    continue
                if joined:
                    g = g.contiguous()
                    dist.all_reduce(g)
                # NaN has no sign: such a scalar stays where it is
                p.sub_(g.sign().nan_to_num_(0.0), alpha=self.lr)

    def _gradients(self, loss: Tensor, name: str, scale: float) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            found = torch.autograd.grad(loss * scale, self.parameters, allow_unused=True)
        if all(g is None for g in found):
            raise ValueError(
                f"the {name} loss does not depend on the weights: compute it anew in each call, by "
                "the model whose parameters the relearner moves"
            )
        return found
