"""What a rule gets in a step: the gradients, and functions over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import Weights
from ._anchors import Anchors
from ._selection import Combined, Selection, combine, select
from ._shards import Shards
from ._slots import Group, SlotList

Figures = dict[str, Any]


class Step:
    """A step's two gradients, and functions over all scalars of the model.

    Attributes:
        slots: parameters that have at least one of the two gradients, as local parts.
        g_f, g_r: gradients per slot, None if missing; the loss scale is not undone.
        inv_scale: the factor that undoes the loss scale, 0-d float64; None without GradScaler.
        shards: which local parts this process counts.
        anchors: theta0 and F.
        number: number of steps taken before this one.
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
        """Return the exact top-delta selection of both gradients (method.md, step 1), cached.

        A granularity of None selects nothing.
        """
        key = (granularity, fused)
        if key not in self._selections:
            self._selections[key] = select(
                self.slots,
                self.g_f,
                self.g_r,
                granularity=granularity,
                fused=fused,
                shards=self.shards,
            )
        return self._selections[key]

    def combine(
        self, selection: Selection, weigh: Callable[[Group], tuple[Weights, float]], **how: bool
    ) -> Combined:
        """Return G, made by the kernels in the buffer of a spent gradient; see `_selection`."""
        inv_scale = None if self.inv_scale is None else self.inv_scale.float()
        return combine(
            self.slots,
            self.g_f,
            self.g_r,
            selection,
            self.anchors,
            weigh=weigh,
            inv_scale=inv_scale,
            shards=self.shards,
            **how,
        )

    def average(self, fused: bool | None) -> None:
        """Add the squares of g_r to an online F; g_r is spent."""
        alone = Step(
            self.slots,
            [None] * len(self.slots),
            self.g_r,
            self.inv_scale,
            self.shards,
            self.anchors,
            self.number,
        )
        nothing = Weights(0.0, 0.0), 0.0
        alone.combine(alone.select(None, fused), lambda group: nothing, counted=False)

    def nonfinite(self) -> Tensor:
        """Count NaN and Inf in g_f and in g_r, int64 [2]; this waits for the device."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.slots[0].param.device)
        for i, grads in enumerate((self.g_f, self.g_r)):
            for slot, g in zip(self.slots, grads, strict=True):
                if g is not None and self.shards.counts(slot.key):
                    counts[i] += (~g.isfinite()).sum().to(counts.device)
        self.shards.add(counts)
        return counts

    def gradients(self, i: int) -> tuple[Tensor, Tensor]:
        """Return g_f and g_r of the i-th slot as new tensors with the loss scale undone.

        They have float32 at least. A missing gradient is all zeros.
        """
        return self._wide(self.g_f, i), self._wide(self.g_r, i)

    def _wide(self, grads: Sequence[Tensor | None], i: int) -> Tensor:
        p, g = self.slots[i].param, grads[i]
        if g is None:
            return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return wide(g, self.inv_scale)

    def add_up(self, parts: Iterable[Tensor]) -> Tensor:
        """Sum 0-d tensors of this process, as 0-d float64 on the first parameter's device."""
        total = torch.zeros((), dtype=torch.float64, device=self.slots[0].param.device)
        for part in parts:
            total += part.to(total.device)
        return total

    def gramians(
        self,
        parts: Sequence[Sequence[int]],
        of: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Return [[f.f, f.r], [f.r, r.r]] for each part of the model, float64 [parts, 2, 2].

        Args:
            parts: the indices of the slots in each part, the same on every process.
            of: returns f and r of a slot index, with the loss scale undone; None takes g_f and g_r.
        """
        totals = torch.stack([self._inner(part, of) for part in parts])
        self.shards.add(totals)
        if of is None and self.inv_scale is not None:
            totals = totals * self.inv_scale**2
        return totals[:, [1, 0, 0, 2]].view(-1, 2, 2)

    def _inner(
        self, part: Iterable[int], of: Callable[[int], tuple[Tensor, Tensor]] | None
    ) -> Tensor:
        """Return f.r, f.f and r.r of this process."""
        counted = [i for i in part if self.shards.counts(self.slots[i].key)]
        pairs = [(self.g_f[i], self.g_r[i]) if of is None else of(i) for i in counted]
        return torch.stack(
            [
                self.add_up(
                    (f.double() * r).sum() for f, r in pairs if f is not None and r is not None
                ),
                self.add_up(square(f) for f, _ in pairs if f is not None),
                self.add_up(square(r) for _, r in pairs if r is not None),
            ]
        )

    @cached_property
    def _products(self) -> Tensor:
        return self.gramians([range(len(self.slots))])[0].flatten()[[1, 0, 3]]

    @property
    def dot(self) -> Tensor:
        """Inner product of g_f and g_r over the whole model, loss scale undone; 0-d float64."""
        return self._products[0]

    @property
    def forget_sq(self) -> Tensor:
        """Squared 2-norm of g_f, like `dot`."""
        return self._products[1]

    @property
    def remember_sq(self) -> Tensor:
        """Squared 2-norm of g_r, like `dot`."""
        return self._products[2]


def square(t: Tensor) -> Tensor:
    """|t|^2, 0-d float64. If t is float32 or smaller, it is finite exactly if all of t is."""
    return t.double().square().sum()


def wide(g: Tensor, inv_scale: Tensor | None) -> Tensor:
    """Return a new tensor in float32 at least, with the loss scale undone."""
    made = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
    return made if inv_scale is None else made.mul_(inv_scale.to(g.device))
