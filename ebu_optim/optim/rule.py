"""A rule: what G is made of the two gradients. `PhasedOptimizer` does the rest.

A rule of your own takes one tensor at a time, and need not know of phases, GradScaler, processes,
shards, clipping or checkpoints:

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import Weights
from . import _checks
from ._anchors import Anchors
from ._selection import Combined, Selection, combine, select
from ._shards import Shards, like, local, spread
from ._slots import Group, Key, Slot, SlotList

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
Figures = dict[str, Any]


class Step:
    """A step's gradients as they came, and what is asked over all scalars of the model.

    Attributes:
        slots: with local parameters; those that have at least one of the two gradients.
        g_f, g_r: per slot, None where missing, loss scale not undone.
        inv_scale: what undoes the loss scale, a 0-d float64 tensor; None without GradScaler.
        shards: how parts of parameters count together.
        anchors: theta0 and F.
        number: steps taken before this one.
    """

    def __init__(
        self,
        slots: SlotList,
        g_f: Sequence[Tensor | None],
        g_r: Sequence[Tensor | None],
        inv_scale: Tensor | None,
        shards: Shards,
        anchors: Anchors,
        number: int,
    ) -> None:
        self.slots, self.g_f, self.g_r = slots, g_f, g_r
        self.inv_scale, self.shards, self.anchors, self.number = inv_scale, shards, anchors, number
        self._selections: dict[Any, Selection] = {}

    def select(self, granularity: str | None = "model", fused: bool | None = None) -> Selection:
        """The exact top-delta selection of both gradients (method.md, step 1), made once; a
        granularity of None selects nothing."""
        key = (granularity, fused)
        if key not in self._selections:
            self._selections[key] = select(
                self.slots, self.g_f, self.g_r,
                granularity=granularity, fused=fused, shards=self.shards,
            )  # fmt: skip
        return self._selections[key]

    def combine(
        self, selection: Selection, weigh: Callable[[Group], tuple[Weights, float]], **how: bool
    ) -> Combined:
        """G by the kernels, in the buffer of a spent gradient; see `_selection.combine`."""
        inv_scale = None if self.inv_scale is None else self.inv_scale.float()
        return combine(
            self.slots, self.g_f, self.g_r, selection, self.anchors, weigh=weigh,
            inv_scale=inv_scale, shards=self.shards, **how,
        )  # fmt: skip

    def average(self, fused: bool | None) -> None:
        """The squares of g_r go into an online F; g_r is spent."""
        alone = Step(
            self.slots, [None] * len(self.slots), self.g_r, self.inv_scale, self.shards,
            self.anchors, self.number,
        )  # fmt: skip
        alone.combine(alone.select(None, fused), lambda group: (Weights(0.0, 0.0), 0.0))

    def nonfinite(self) -> Tensor:
        """How many elements of g_f and of g_r are NaN or Inf, int64 [2]; waits for the device."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.slots[0].param.device)
        for i, grads in enumerate((self.g_f, self.g_r)):
            for slot, g in zip(self.slots, grads, strict=True):
                if g is not None and self.shards.counts(slot.key):
                    counts[i] += (~g.isfinite()).sum().to(counts.device)
        self.shards.add(counts)
        return counts

    def gradients(self, i: int) -> tuple[Tensor, Tensor]:
        """g_f and g_r of the i-th slot as new tensors of float32 at least, loss scale undone; a
        missing one as zeros."""
        return self._wide(self.g_f, i), self._wide(self.g_r, i)

    def _wide(self, grads: Sequence[Tensor | None], i: int) -> Tensor:
        p, g = self.slots[i].param, grads[i]
        if g is None:
            return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return wide(g, self.inv_scale)

    def add_up(self, parts: Iterable[Tensor]) -> Tensor:
        """The sum of 0-d tensors of this process, 0-d float64 on the first parameter's device."""
        total = torch.zeros((), dtype=torch.float64, device=self.slots[0].param.device)
        for part in parts:
            total += part.to(total.device)
        return total

    @cached_property
    def _products(self) -> Tensor:
        counted = [
            (f, r)
            for s, f, r in zip(self.slots, self.g_f, self.g_r, strict=True)
            if self.shards.counts(s.key)
        ]
        totals = torch.stack([
            self.add_up(
                (f.double() * r).sum() for f, r in counted if f is not None and r is not None
            ),
            self.add_up(square(f) for f, _ in counted if f is not None),
            self.add_up(square(r) for _, r in counted if r is not None),
        ])  # fmt: skip
        self.shards.add(totals)
        return totals if self.inv_scale is None else totals * self.inv_scale**2

    @property
    def dot(self) -> Tensor:
        """Inner product of g_f and g_r over the whole model, loss scale undone, 0-d float64."""
        return self._products[0]

    @property
    def forget_sq(self) -> Tensor:
        """Squared 2-norm of g_f, like `dot`."""
        return self._products[1]

    @property
    def remember_sq(self) -> Tensor:
        """Squared 2-norm of g_r, like `dot`."""
        return self._products[2]


class Rule:
    """A method's update; a subclass gives `update`, and `begin` where it needs figures first.

    Args:
        numbers: the method's numbers by name. They live in the parameter groups as
            ``ebu_<name>``, where they can be scheduled and differ between groups; they are saved,
            and compared over the ranks.

    Attributes:
        needs: the phases that a step needs, of "forget" and "remember".
        penalised: whether the rule uses theta0 and F, which are then held.
        options: what is chosen once, by name: shown by ``repr`` and compared over the ranks.
        fused: which kernels serve it, as in torch.optim.
    """

    needs: tuple[str, ...] = ("forget", "remember")
    penalised = True
    fused: bool | None = False

    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers
        self.options: dict[str, Any] = {}

    # -- what a method is -----------------------------------------------------------------------

    def begin(self, step: Step) -> Figures:
        """Before the first parameter of a step: figures for `update`. `stats` shows those whose
        name has no leading underscore: numbers or 0-d tensors."""
        return {}

    def update(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        """G of one parameter.

        Args:
            slot: ``slot.param`` is theta, ``slot.group["ebu_<name>"]`` the rule's numbers.
            g_f, g_r: new tensors of the parameter's shape, in float32 or float64, zeros where the
                loss made no gradient; may be written.
            figures: of `begin`.
        """
        raise NotImplementedError(f"{type(self).__name__}.update")

    def moves(self, slot: Slot) -> Tensor | None:
        """Which scalars of a parameter the step may move, bool; the rest is kept bit-identical
        through the base step. None: all."""
        return None

    # -- its own state, by key ------------------------------------------------------------------

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        """Tensors for the checkpoint, named ``ebu_...``."""
        return {}

    def load(self, saved: Mapping[Key, Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
        """Take what `state` gave."""

    # -- all slots at once ----------------------------------------------------------------------

    def nonfinite(self, step: Step) -> Tensor:
        """How many elements of g_f and of g_r are NaN or Inf, int64 [2]. Changes nothing."""
        return torch.zeros(2, dtype=torch.int64) if self.finite(step) else step.nonfinite()

    def finite(self, step: Step) -> bool:
        """Whether both gradients are, on all processes."""
        return bool(torch.stack([step.forget_sq, step.remember_sq]).isfinite().all())

    def combine(self, step: Step) -> Combined:
        """G of every slot, one by one; nothing but spent gradients is written."""
        figures = self.begin(step)
        products = step.dot, step.forget_sq, step.remember_sq  # before G takes the buffers
        averaged = step.anchors.mode == "online" and step.anchors.active
        out, update_sq, moved_sq = [], [], []
        held: list[Tensor] = []
        for i, slot in enumerate(step.slots):
            G = self.update(slot, *step.gradients(i), figures)
            # G takes the place of a spent gradient; g_r is used once more by an online F
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
        """After the check of G: the squares of g_r go into an online F."""
        if step.anchors.mode == "online" and step.anchors.active:
            step.average(self.fused)

    def read(self, last: Any) -> dict[str, Any]:
        """`stats` of the last accepted step: see `PhasedOptimizer.stats`."""
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
    """Those that `stats` shows."""
    return {name: value for name, value in figures.items() if not name.startswith("_")}


def square(t: Tensor) -> Tensor:
    """|t|^2, 0-d float64: finite exactly where every element of a float32 or smaller t is."""
    return t.double().square().sum()


def wide(g: Tensor, inv_scale: Tensor | None) -> Tensor:
    """In float32 at least, the loss scale undone; always a new tensor."""
    made = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
    return made if inv_scale is None else made.mul_(inv_scale.to(g.device))


def weight(name: str, value: Any) -> float:
    """A finite number >= 0.

    Raises:
        ValueError: it is none; the message has the name and the value.
    """
    number = _checks.number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return number
