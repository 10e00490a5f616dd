"""AEGIS's projection: removes from the forget gradient what moves away from theta0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import PhasedOptimizer, Rule, Slot, Step, TensorMap
from ..optim.rule import Figures, Key, like, local, spread, weight
from ._recipe import recipe

#: The upper bound of w in the published code.
LARGEST = 1e6


class Homeward(Rule):
    """For each tensor, G = f - w proj_r(f) where <f, r> < 0, else f; r = theta - theta0.

    w grows by ``mu`` where f opposes the last step's projection, else it shrinks by ``mu``. w and
    the projection are saved.
    """

    needs = ("forget",)
    anchored = True

    def __init__(self, mu: float) -> None:
        super().__init__(mu=weight("mu", mu))
        self.w: dict[Key, Tensor] = {}
        self.last: dict[Key, Tensor] = {}
        # w and the share of the step that is being made
        self._next: dict[Key, tuple[Tensor, Tensor]] = {}

    def begin(self, step: Step) -> Figures:
        each = [[i] for i in range(len(step.slots))]
        now = step.gramians(each, lambda i: (step.gradients(i)[0], way(step, step.slots[i])))
        dots, squares = now[:, 0, 1], now[:, 1, 1]
        shares = torch.where(squares > 0, dots / squares, 0.0)
        before = step.gramians(each, lambda i: self._before(step, i))[:, 0, 1]
        mu = dots.new_tensor([float(s.group["ebu_mu"]) for s in step.slots])
        held = torch.stack([self.w.get(s.key, torch.zeros(())).to(dots) for s in step.slots])
        w = (held - mu * before.sign()).clamp(0.0, LARGEST)
        self._next = {s.key: (w[i], shares[i]) for i, s in enumerate(step.slots)}
        return {"conflicts": (dots < 0).sum(), "projection_weight": w.mean(), "_step": step}

    def _before(self, step: Step, i: int) -> tuple[Tensor, Tensor]:
        f, _ = step.gradients(i)
        last = self.last.get(step.slots[i].key)
        return f, torch.zeros_like(f) if last is None else last.to(f)

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        w, share = self._next[slot.key]
        taken = (w * share.clamp(max=0.0)).to(g_f)
        return g_f.sub_(way(figures["_step"], slot).to(g_f).mul_(taken))

    def accepted(self, step: Step) -> None:
        for slot in step.slots:
            w, share = self._next[slot.key]
            self.w[slot.key] = w.detach().clone()
            r = way(step, slot)
            self.last[slot.key] = r.mul_(share.to(r))

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        return {
            s.key: {
                "ebu_projection_weight": self.w.get(s.key, torch.zeros((), dtype=torch.float64)),
                "ebu_projection": like(self.last[s.key], s.param)
                if s.key in self.last
                else torch.zeros_like(s.param, dtype=_wide(s.param)),
            }
            for s in slots
        }

    def load(self, saved: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
        self.w, self.last = {}, {}
        for s in slots:
            mine = saved.get(s.key, {})
            if "ebu_projection" in mine:
                self.w[s.key] = mine["ebu_projection_weight"].to(s.param.device, copy=True)
                whole = mine["ebu_projection"].to(s.param.device, copy=True)
                self.last[s.key] = local(spread(whole, s.param))


def way(step: Step, slot: Slot) -> Tensor:
    """Return theta - theta0 of a slot, a new tensor in float32 at least."""
    anchor = local(step.anchors.anchor[slot.key]).to(slot.param.device)
    return slot.param.to(_wide(slot.param), copy=True).sub_(anchor)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


class AEGIS(PhasedOptimizer):
    r"""AEGIS's projection (arXiv 2602.06771): it replays nothing but stays near :math:`\theta_0`.

    With :math:`r = \theta - \theta_0`, the direction of the gradient of
    :math:`|\theta - \theta_0|^2`, each tensor separately has

    .. math:: G = g_f - w \frac{\min(\langle g_f, r\rangle, 0)}{|r|^2} r, \qquad
              w \leftarrow \min(\max(w - \mu\, \mathrm{sign} \langle g_f, p \rangle, 0), 10^6)

    where w is changed first and begins at 0, and p is the projection of the last step's forget
    gradient on its r. With w >= 1, to first order, a step does not lead further from
    :math:`\theta_0`. With a smaller w it leads away more slowly. `stats` has the number of tensors
    in conflict and the mean of w.

    At :math:`\theta_0` itself, where the published code divides by zero, there is no projection.
    The published forget loss is :func:`~ebu_optim.diffusion.esd_loss` under an embedding that an
    adversary trains; the projection works with any forget loss.

    Args:
        base: a torch optimizer; Adam 1e-5 in the published runs.
        mu: the change of w in each step, >= 0.
        anchor: theta0; None takes the weights at the first phase.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    needs = ("forget",)

    def __init__(
        self,
        base: Optimizer,
        *,
        mu: float = 0.2,
        anchor: TensorMap | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base, Homeward(mu), anchor=anchor, max_grad_norm=max_grad_norm, nonfinite=nonfinite
        )


#: What AEGIS learns from.
RECIPE = recipe("AEGIS", AEGIS, strength="mu", remembers=None, held=2)
