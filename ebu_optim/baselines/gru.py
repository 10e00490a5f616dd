"""GRU: the forget gradient without what opposes a running mean of the remember gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import Slot, Step
from ..optim.rule import Figures, Key, Rule, like, local, spread, weight
from ._gramian import GramianOptimizer, OfGramian
from ._recipe import recipe


def rectified(gramians: Tensor) -> Tensor:
    """Return the weights of f and m from [[f.f, f.m], [f.m, m.m]]: m's is > 0 if they oppose."""
    dot = gramians[..., 0, 1]
    weights = torch.where(dot < 0, -dot / gramians[..., 1, 1], 0.0)
    return torch.stack([torch.ones_like(weights), weights], -1)


class Rectified(OfGramian):
    """G = f - min(<f, m>, 0) / <m, m> m + w_r g_r, where m is the running mean of g_r.

    m is saved.

    Args:
        smoothing: the share of the new g_r in m, in (0, 1].
        remember_weight: w_r, >= 0.
        scope: as for `OfGramian`.
    """

    def __init__(self, smoothing: float, remember_weight: float, scope: str) -> None:
        super().__init__(scope, remember_weight=remember_weight)
        if not 0 < weight("smoothing", smoothing) <= 1:
            raise ValueError(f"smoothing must be in (0, 1]; got {smoothing!r}")
        self.options["smoothing"] = float(smoothing)
        self.mean: dict[Key, Tensor] = {}
        self._next: dict[Key, Tensor] = {}  # m of the step that is being made

    def begin(self, step: Step) -> Figures:
        s = self.options["smoothing"]
        self._next = {}
        for i, slot in enumerate(step.slots):
            new = step.gradients(i)[1].mul_(s)
            mean = self.mean.get(slot.key)
            self._next[slot.key] = new if mean is None else new.add_(mean.to(new), alpha=1 - s)
        figures = super().begin(step)
        if self.options["scope"] == "model":
            row = torch.stack([figures.pop(f"{n}_weight") for n in ("forget", "remember")])
            figures["rectified"] = row[1]
            figures["_weights"] = dict.fromkeys((s.key for s in step.slots), row)
        return figures

    def gramians(self, step: Step, parts: Any) -> Tensor:
        return step.gramians(parts, lambda i: (step.gradients(i)[0], self._next[step.slots[i].key]))

    def weights(self, gramians: Tensor, w: Tensor) -> Tensor:
        return rectified(gramians)  # w_r belongs to g_r, not to m

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        m = figures["_weights"][slot.key][1].to(g_f) * self._next[slot.key]
        return g_f.add_(m).add_(g_r, alpha=slot.group["ebu_remember_weight"])

    def accepted(self, step: Step) -> None:
        self.mean |= self._next
        super().accepted(step)

    @property
    def _way(self) -> type[Rule]:
        return Rule

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        return {
            s.key: {
                "ebu_remember_mean": like(self.mean[s.key], s.param)
                if s.key in self.mean
                else _zeros(s.param)
            }
            for s in slots
        }

    def load(self, saved: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
        self.mean = {
            s.key: local(spread(mean.to(s.param.device, copy=True), s.param))
            for s in slots
            if (mean := saved.get(s.key, {}).get("ebu_remember_mean")) is not None
        }


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


class GRU(GramianOptimizer):
    r"""GRU (Wang et al., 2025): gradient rectified unlearning, as in its code.

    .. math:: m \leftarrow s\, g_r + (1 - s)\, m, \qquad
              G = g_f - \frac{\min(\langle g_f, m\rangle, 0)}{|m|^2}\, m + w_r g_r

    over all parameters as one vector, with m = 0 before the first step. To first order, the
    rectified forget gradient does not raise the remember loss, but it does not lower it either. The
    published method has w_r = 0; its variants "+ce" and "+KL" have 1. `stats` has the weight of m,
    "rectified".

    m takes one more number per weight. Skipped steps do not change it.

    Args:
        base: a torch optimizer.
        smoothing: s in (0, 1], the share of the new gradient; 0.8 in the published runs.
        remember_weight: w_r, >= 0.
        scope: "model", or each "tensor" or "module" separately, as for :class:`PCGrad`.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        smoothing: float = 0.8,
        remember_weight: float = 0.0,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        rule = Rectified(smoothing, remember_weight, scope)
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


#: What GRU learns from.
RECIPE = recipe("GRU", GRU, strength="remember_weight", held=1)
