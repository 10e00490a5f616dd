"""A rule: how the combined gradient G is made from the two gradients.

`PhasedOptimizer` does the rest. A rule takes one tensor at a time. It does not need to handle
phases, GradScaler, processes, shards, clipping or checkpoints:

.. code-block:: python

    class Agreeing(Rule):
        "G = g_r + w g_f where the two gradients have the same sign, g_r elsewhere."

        def update(self, slot, g_f, g_r, figures):
            agrees = g_f * g_r > 0
            return g_r + slot.group["ebu_w"] * g_f * agrees

    opt = PhasedOptimizer(Adam(model.parameters()), Agreeing(w=0.5), max_grad_norm=1.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._selection import Combined, Selection, select
from ._shards import Shards, like, local, spread
from ._slots import Key, Slot
from ._step import Figures, Step, square, wide

__all__ = [
    "Combined",
    "Figures",
    "Key",
    "Rule",
    "Selection",
    "Shards",
    "Slot",
    "Step",
    "choice",
    "like",
    "local",
    "select",
    "spread",
    "square",
    "weight",
    "wide",
]

choice = _checks.choice


class Rule:
    """The update of a method.

    A subclass defines `update`, and `begin` if it needs figures of the whole model first.

    Args:
        numbers: the method's numbers by name. They are in the parameter groups as ``ebu_<name>``,
            where they can be scheduled and may differ between groups. They are saved, and compared
            over the ranks.

    Attributes:
        needs: which phases must have run before a step: "forget", "remember" or both.
        penalised: whether the rule uses theta0 and F, which are then held.
        anchored: whether the rule uses theta0 even if there is no F.
        options: choices that do not change, by name; shown by ``repr`` and compared over the ranks.
        fused: which kernels it uses, as in torch.optim.
    """

    needs: tuple[str, ...] = ("forget", "remember")
    penalised = True
    anchored = False
    fused: bool | None = False

    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers
        self.options: dict[str, Any] = {}

    # -- what a method is -----------------------------------------------------------------------

    def begin(self, step: Step) -> Figures:
        """Return the figures that `update` needs, before the first parameter of a step.

        `stats` shows those whose name has no leading underscore: numbers or 0-d tensors.
        """
        return {}

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        """Return G of one parameter.

        Args:
            slot: ``slot.param`` is theta, ``slot.group["ebu_<name>"]`` are the rule's numbers.
            g_f, g_r: new tensors of the parameter's shape, in float32 or float64; zeros where the
                loss made no gradient. They may be overwritten.
            figures: what `begin` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.update")

    def moves(self, slot: Slot) -> Tensor | None:
        """Return which scalars of a parameter the step may move, bool; None means all.

        The others are kept bit-identical through the base step.
        """
        return None

    # -- the rule's own state, by key -----------------------------------------------------------

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        """Return tensors for the checkpoint, named ``ebu_...``."""
        return {}

    def load(self, saved: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
        """Load what `state` returned."""

    # -- all slots at once ----------------------------------------------------------------------

    def nonfinite(self, step: Step) -> Tensor:
        """Count the elements of g_f and g_r that are NaN or Inf, int64 [2]. Changes nothing."""
        return torch.zeros(2, dtype=torch.int64) if self.finite(step) else step.nonfinite()

    def finite(self, step: Step) -> bool:
        """Whether both gradients are finite on all processes."""
        return bool(torch.stack([step.forget_sq, step.remember_sq]).isfinite().all())

    def combine(self, step: Step) -> Combined:
        """Return G of every slot, one by one. Only spent gradients are overwritten."""
        figures = self.begin(step)
        products = step.dot, step.forget_sq, step.remember_sq  # before G overwrites the buffers
        averaged = step.anchors.mode == "online" and step.anchors.active
        out, update_sq, moved_sq = [], [], []
        held: list[Tensor] = []
        for i, slot in enumerate(step.slots):
            G = self.update(slot, *step.gradients(i), figures)
            # G takes the buffer of a spent gradient; an online F still needs g_r
            spent = (step.g_f[i], None if averaged else step.g_r[i])
            buffer = next((t for t in spent if t is not None), None)
            buffer = torch.empty_like(slot.param) if buffer is None else buffer
            out.append(buffer.copy_(G))
            if step.shards.counts(slot.key):
                update_sq.append(square(buffer))
                if slot.key in step.anchors.anchor:
                    anchor = local(step.anchors.anchor[slot.key]).to(slot.param.device)
                    moved_sq.append(square(slot.param.double() - anchor))
            movable = self.moves(slot)
            if movable is not None:
                held.append(slot.param.masked_fill(movable, math.nan))
        totals = torch.stack([step.add_up(update_sq), step.add_up(moved_sq)])
        step.shards.add(totals)
        vector = torch.stack([*products, *totals])
        total = sum(map(step.shards.numel, step.slots))
        last = (vector, total, bool(step.anchors.anchor), shown(figures))
        nonfinite = (~totals[0].isfinite()).double()
        return Combined(out, held or None, nonfinite, totals[0], last)

    def accepted(self, step: Step) -> None:
        """After G was checked, add the squares of g_r to an online F."""
        if step.anchors.mode == "online" and step.anchors.active:
            step.average(self.fused)

    def read(self, last: Any) -> dict[str, Any]:
        """Return the `stats` of the last accepted step; see `PhasedOptimizer.stats`."""
        vector, total, anchored, figures = last
        dot, f, r, update, moved = vector.tolist()
        norms = math.sqrt(f) * math.sqrt(r)
        stats: dict[str, Any] = {"total": total}
        if "forget" in self.needs:
            stats["forget_norm"] = math.sqrt(f)
        if "remember" in self.needs:
            stats["remember_norm"] = math.sqrt(r)
        if len(self.needs) == 2:
            stats["cosine"] = dot / norms if norms else math.nan
        stats["update_norm"] = math.sqrt(update)
        if anchored:
            stats["moved"] = math.sqrt(moved)
        return stats | {k: v.item() if isinstance(v, Tensor) else v for k, v in figures.items()}


def shown(figures: Figures) -> Figures:
    """Return the figures that `stats` shows."""
    return {name: value for name, value in figures.items() if not name.startswith("_")}


def weight(name: str, value: Any) -> float:
    """Return a finite number >= 0.

    Raises:
        ValueError: the number is negative or not finite; the message has its name and value.
    """
    number = _checks.number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return number
