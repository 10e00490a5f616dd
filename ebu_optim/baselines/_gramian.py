"""Rules that are a weighted sum of the two gradients, with weights from their inner products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import PhasedOptimizer, Rule, Slot, Step, WeightedSum
from ..optim.rule import Combined, Figures, choice

#: Maps Gramians, float64 [parts, 2, 2], to two weights each, [parts, 2].
Weighting = Callable[[Tensor], Tensor]


class OfGramian(WeightedSum):
    """G = a g_f + b g_r, where (a, b) are a function of the Gramian [[f.f, f.r], [f.r, r.r]].

    A subclass defines `weights`.

    Args:
        scope: what has its own Gramian and weights: the "model", each "tensor", or each "module"
            (the modules are found by the parameters' names).
        numbers: ``forget_weight`` and ``remember_weight``, w_f and w_r, >= 0; both are optional.
    """

    def __init__(self, scope: str, **numbers: Any) -> None:
        super().__init__(**numbers)
        self.options = {"scope": choice("scope", scope, tuple(_PARTS))}

    def weights(self, gramians: Tensor, w: Tensor) -> Tensor:
        """Return a and b of each part, [parts, 2]; w holds w_f and w_r."""
        raise NotImplementedError(f"{type(self).__name__}.weights")

    def gramians(self, step: Step, parts: Sequence[Sequence[int]]) -> Tensor:
        """Return the Gramians that `weights` gets; a subclass may use another metric."""
        return step.gramians(parts)

    def begin(self, step: Step) -> Figures:
        parts = parts_of(step.slots, self.options["scope"])
        gramians = self.gramians(step, parts)
        names = "forget_weight", "remember_weight"
        w = [float(step.slots[0].group.get(f"ebu_{name}", 1.0)) for name in names]
        weights = self.weights(gramians, gramians.new_tensor(w))
        if self.options["scope"] == "model":
            return dict(zip(names, weights[0], strict=True))
        return {
            "parts": len(parts),
            "conflicts": (gramians[:, 0, 1] < 0).sum(),
            "_weights": {
                step.slots[i].key: row
                for part, row in zip(parts, weights, strict=True)
                for i in part
            },
        }

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        return figures["forget_weight"], figures["remember_weight"], 0.0

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        a, b = figures["_weights"][slot.key].to(g_f)
        return g_f.mul_(a).add_(g_r.mul_(b))

    # the kernels use one pair of weights per group, so parts are combined tensor by tensor

    def combine(self, step: Step) -> Combined:
        return self._way.combine(self, step)

    def read(self, last: Any) -> dict[str, Any]:
        return self._way.read(self, last)

    @property
    def _way(self) -> type[Rule]:
        return WeightedSum if self.options["scope"] == "model" else Rule


class Weighed(OfGramian):
    """A weighted sum whose weights come from a weighting function.

    Args:
        weighting: maps the Gramians of (w_f g_f, w_r g_r) to the weights of these two.
        scope, numbers: as for `OfGramian`.
    """

    def __init__(self, weighting: Weighting, scope: str, **numbers: Any) -> None:
        super().__init__(scope, **numbers)
        self.weighting = weighting

    def weights(self, gramians: Tensor, w: Tensor) -> Tensor:
        return self.weighting(gramians * w * w[:, None]) * w


class GramianOptimizer(PhasedOptimizer):
    """An optimizer with a rule over Gramians, whose numbers are the same in all groups."""

    def __init__(self, base: Optimizer, rule: Rule, **engine: Any) -> None:
        super().__init__(base, rule, **engine)
        for name in ("forget_weight", "remember_weight"):
            if len({group.get(f"ebu_{name}") for group in self.param_groups}) > 1:
                raise ValueError(
                    f"{type(self).__name__} needs one {name} for all groups, because it weighs the "
                    "parameters together; give every group the same value"
                )
        parts_of(self._slots(), rule.options["scope"])  # raises if names are needed and missing


def parts_of(slots: Sequence[Slot], scope: str) -> list[list[int]]:
    """Return the indices of the slots in each part, in the order of the first slot of each.

    Raises:
        ValueError: scope is "module" and the optimizer does not know its parameters' names.
    """
    found: dict[Any, list[int]] = {}
    for i, slot in enumerate(slots):
        found.setdefault(_PARTS[scope](slot), []).append(i)
    return list(found.values())


def _module(slot: Slot) -> str:
    names = slot.group.get("param_names")
    if not names:
        raise ValueError(
            'scope="module" needs the names of the parameters; build the base optimizer with '
            'model.named_parameters() (torch 2.6 or later), or use scope="tensor"'
        )
    return str(names[slot.place[1]]).rpartition(".")[0]


_PARTS: dict[str, Callable[[Slot], Any]] = {
    "model": lambda slot: None,
    "tensor": lambda slot: slot.key,
    "module": _module,
}


def cosines(gramians: Tensor) -> Tensor:
    """Return the cosines of the two gradients, [parts]; 0 where one of them is zero."""
    norms = gramians.diagonal(dim1=-2, dim2=-1).sqrt().prod(-1)
    return torch.where(norms > 0, gramians[..., 0, 1] / norms, 0.0)


def surgery(gramians: Tensor) -> Tensor:
    """Return PCGrad's two weights from [[f.f, f.r], [f.r, r.r]], [..., 2, 2] to [..., 2]."""
    dot = gramians[..., 0, 1, None]
    # where dot < 0, neither gradient is zero, so neither square is
    return torch.where(dot < 0, 1 - dot / gramians.diagonal(dim1=-2, dim2=-1), 1.0)
