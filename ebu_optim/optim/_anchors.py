"""theta0 and F, which penalties need. They are kept by tensor and never in the base's state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import repeat
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from ..kernels.contract import Column
from . import _checks
from ._holding import Holding, Reference, TensorMap
from ._shards import Shards, any_sharded, local, local_gradient, spread
from ._slots import Key, Slot, SlotList

_SHAPE = attrgetter("shape")


class Anchors:
    """The anchor theta0 and the Fisher F of every trainable parameter.

    Args:
        slots: the optimizer's parameters.
        fisher: "online", None or a mapping; see EBUOptimizer.
        anchor: a mapping, or None to take theta0 at the first phase.
        used: whether the rule has a penalty. If False, given tensors are held, but none is taken.
        unit: scale F by 1 / sqrt(mean F).
        holding: how theta0 and F are held.
        alone: take theta0 even where there is no F.

    Attributes:
        mode: "online", "warm" (an online F, frozen), "fixed" (a mapping) or "none".
        anchor, fisher: the tensors by key, including those of parameters that have left the groups.
        count: by key, the number of batches that an online F is the mean of.
        mean: the mean of F, 0-d float64; None if it has to be computed again.
    """

    def __init__(
        self,
        slots: SlotList,
        fisher: str | TensorMap | None,
        anchor: TensorMap | None,
        used: bool,
        unit: bool,
        holding: Holding | None = None,
        alone: bool = False,
    ) -> None:
        self.used, self.unit, self.holding = used, unit, holding or Holding()
        self.alone = alone
        self.holding.check()
        self._reference = Reference(self.holding.anchor_source)
        self._present = slots.key_set
        self._columns = Column(), Column()  # of the last step
        self._fits: tuple[SlotList | None, list[torch.Size]] = None, []  # see `take`
        self.anchor: dict[Key, Tensor] = {}
        self.fisher: dict[Key, Tensor] = {}
        self.count: dict[Key, int] = {}
        self.mean: Tensor | None = None
        self.anchor_given = anchor is not None
        if isinstance(fisher, str):
            self.mode = _checks.choice("fisher", fisher, ("online",))
        elif fisher is None:
            self.mode = "none"
        else:
            self.mode = "fixed"
            found = _checks.tensor_map("fisher", fisher, slots, nonnegative=True)
            self.fisher = {key: self.holding.fisher(f) for key, f in found.items()}
        if anchor is not None:
            found = _checks.tensor_map("anchor", anchor, slots)
            self.anchor = {
                s.key: self.holding.anchor(found[s.key].to(s.param.dtype, copy=True), s.name)
                for s in slots
                if s.key in found
            }

    @property
    def active(self) -> bool:
        return self.mode != "none" and self.used

    @property
    def wanted(self) -> bool:
        """Whether theta0 of the trained parameters has to be taken."""
        return self.active or self.alone or bool(self.anchor)

    @torch.no_grad()
    def take(self, slots: SlotList) -> None:
        """At a step's first phase, take theta0 and an empty F of parameters that have none yet."""
        known, shapes = self._fits
        if known is not slots or not all(map(eq, map(_SHAPE, slots.params), shapes)):
            self._check_shapes(slots)
            self._fits = slots, list(map(_SHAPE, slots.params))
        # theta0 and F may have been given before the parameters were sharded
        for slot in slots if any_sharded(slots.params) else ():
            for own in (self.anchor, self.fisher):
                if slot.key in own:
                    own[slot.key] = spread(own[slot.key], slot.param)
        self._look(slots)
        if not self.wanted:
            return
        if slots and not any(slot.param.requires_grad for slot in slots):
            raise RuntimeError(
                "none of the optimizer's parameters requires a gradient, so no theta0 and F would "
                "be kept and the penalty would be missing; unfreeze the model, or call "
                "requires_grad_() on master copies whose gradients you set by hand"
            )
        self.hold(slots)

    def _check_shapes(self, slots: SlotList) -> None:
        for slot in slots:
            held = self.anchor.get(slot.key, self.fisher.get(slot.key))  # both have the same shape
            if held is not None and held.shape != slot.param.shape:
                raise ValueError(
                    f"{slot.name} has shape {tuple(slot.param.shape)} but its theta0 or F has "
                    f"shape {tuple(held.shape)}: the parameter has changed its shape; build a new "
                    "EBUOptimizer for the new model"
                )

    @torch.no_grad()
    def hold(self, slots: SlotList, by_hand: bool = False) -> None:
        """Take theta0 and an empty F of the trained parameters that have none yet.

        This may run in any phase. Weights do not change between a step's first phase and its end,
        so a parameter that is first trained in a later phase still has its value from the first.

        Args:
            by_hand: also include parameters that require no gradient, because one was set by hand.
        """
        if not self.wanted:
            return
        needed = (self.anchor, self.fisher) if self.active else (self.anchor,)
        if all(all(map(own.__contains__, slots.keys)) for own in needed):
            return
        for slot in slots:
            p = slot.param
            if not (p.requires_grad or by_hand):
                continue
            if self.active and slot.key not in self.fisher:
                if self.mode == "fixed":
                    raise ValueError(
                        f"fisher has no tensor for {slot.name}, which was frozen when the "
                        "optimizer was built; build a new EBUOptimizer with a Fisher that covers it"
                    )
                self.fisher[slot.key] = self.holding.fisher(_empty_fisher(p))
            if slot.key not in self.anchor:
                self.anchor[slot.key] = self.holding.anchor(p.detach().clone(), slot.name)

    def _look(self, slots: SlotList) -> None:
        """Note which parameters are in the groups: the mean of F is taken over these."""
        present = slots.key_set
        if present != self._present and (present ^ self._present) & self.fisher.keys():
            self.mean = None
        self._present = present

    def scale(self, shards: Shards) -> Tensor | float:
        """Return the factor of gamma: 1 / sqrt(mean F) (0 while F is 0), or 1 for "raw"."""
        if not self.unit or self._present.isdisjoint(self.fisher):
            return 1.0
        if self.mean is None:
            held = {key: f for key, f in self.fisher.items() if key in self._present}
            device = local(next(iter(held.values()))).device
            total = torch.zeros((), dtype=torch.float64, device=device)
            for key, f in held.items():
                if shards.counts(key):
                    total += local(f).sum(dtype=torch.float64).to(device)
            shards.add(total)
            self.mean = total / sum(f.numel() for f in held.values())
        if self.mean.is_cpu:
            mean = self.mean.item()
            return 1 / math.sqrt(mean) if mean > 0 else 0.0
        return torch.where(self.mean > 0, self.mean.rsqrt(), 0.0)

    def online_weight(self, key: Key) -> float | None:
        """Return the weight of the next squared gradient in the mean; None where F is fixed."""
        return 1 / (self.count.get(key, 0) + 1) if self.mode == "online" and self.active else None

    def pull(self, slot: Slot, like: Tensor, scale: Tensor | float) -> Tensor:
        """Return `scale` F (theta - theta0) of one parameter in the dtype and place of `like`."""
        anchor, fisher = (local(m[slot.key]).to(like) for m in (self.anchor, self.fisher))
        scale = scale.to(like) if isinstance(scale, Tensor) else scale
        return fisher * scale * (slot.param.to(like) - anchor)

    def columns(self, slots: SlotList) -> tuple[Column, Column]:
        """Return theta0 and F by slot, as this process's parts; None where none is used."""
        held = self.anchor, self.fisher if self.active else {}
        now = [list(map(own.get, slots.keys)) for own in held]
        kept = self._columns
        if not all(len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(now, kept)):
            if any(map(any_sharded, now)):
                return Column(map(local, now[0])), Column(map(local, now[1]))
            self._columns = kept = Column(now[0]), Column(now[1])
        return kept

    def counts(self, slots: SlotList) -> list[int]:
        """Return, by slot, how many batches an online F is the mean of; 0 where F is fixed."""
        online = self.mode == "online" and self.active
        return list(map((self.count if online else {}).get, slots.keys, repeat(0)))

    def counted(self, slots: SlotList, mean: Tensor) -> None:
        """Count one more square in the F of these slots; `mean` is the mean of their F."""
        counts = map((1).__add__, map(self.count.get, slots.keys, repeat(0)))
        self.count.update(zip(slots.keys, counts, strict=True))
        whole = slots.key_set == self._present or slots.key_set >= (
            self._present & self.fisher.keys()
        )
        self.mean = mean if whole else None

    @torch.no_grad()
    def warm(self, slots: Iterable[Slot]) -> None:
        """Average the squares of the gradients on the parameters into F."""
        slots = list(slots)
        self.hold(SlotList(s for s in slots if s.param.grad is not None), by_hand=True)
        for slot in slots:
            if slot.key in self.fisher:
                f, g = local(self.fisher[slot.key]), local_gradient(slot.param.grad, slot.param)
                wide = torch.promote_types(f.dtype, torch.float32)
                square = torch.zeros_like(f, dtype=wide) if g is None else g.to(wide).square()
                n = self.count[slot.key] = self.count.get(slot.key, 0) + 1
                f.copy_(f.to(wide).lerp_(square.to(f.device), 1 / n))
        self.mean = None

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self, slots: SlotList) -> dict[Key, dict[str, Tensor]]:
        """Return what a checkpoint holds.

        A tensor that does not exist yet is included with the value that it would have now. So a
        tool that fills only the keys it finds also fills ours.
        """
        own: dict[Key, dict[str, Tensor]] = {}
        self._look(slots)
        for key, _, p, _, _ in slots:
            mine = own.setdefault(key, {})
            wanted = (self.active or self.alone) and p.requires_grad
            if self.holding.anchor_source is not None:
                pass
            elif key in self.anchor:
                mine["ebu_anchor"] = self.anchor[key].contiguous()
            elif wanted:
                mine["ebu_anchor"] = self.holding.anchor(p.detach().clone(), "").contiguous()
            if key in self.fisher:
                mine["ebu_fisher"] = self.fisher[key]
            elif wanted and self.active and self.mode == "online":
                mine["ebu_fisher"] = self.holding.fisher(_empty_fisher(p))
            if "ebu_fisher" in mine and self.mode != "fixed":
                mine["ebu_fisher_count"] = torch.tensor(self.count.get(key, 0))
        return own

    def reference(self, keys: Iterable[Key]) -> dict[str, Any]:
        """Return where theta0 comes from and its hash, for the checkpoint.

        The hash is over `keys` in that order. It is None as long as theta0 is not taken.
        """
        return self._reference.of(self.anchor, keys)

    def check_reference(self, counters: Mapping[str, Any], keys: Iterable[Key]) -> None:
        """Raise ValueError if a checkpoint only names theta0 and it is not here.

        Args:
            counters: the counters of the checkpoint.
            keys: the keys in the order of the checkpoint.
        """
        self._reference.check(counters, self.anchor if self.anchor_given else {}, keys)

    def load(
        self,
        own: Mapping[Key, Mapping[str, Tensor]],
        slots: SlotList,
        *,
        started: bool,
        frozen: bool,
        mean: float | None,
    ) -> None:
        """Load a checkpoint's tensors; one from before the first phase drops what was taken."""
        if self.mode != "fixed":
            self.fisher, self.count = {}, {}
        if self.mode in ("online", "warm"):
            self.mode = "warm" if frozen else "online"
        by_reference = self.holding.anchor_source is not None and self.anchor_given
        if (started or not self.anchor_given) and not by_reference:
            self.anchor = {}
            self._reference.forget()
        self._present, self.mean = slots.key_set, None
        self._columns, self._fits = (Column(), Column()), (None, [])
        for slot in slots:
            mine = own.get(slot.key, {})
            if started and "ebu_anchor" in mine:
                loaded = _own(mine["ebu_anchor"], slot.param)
                self.anchor[slot.key] = self.holding.anchor(loaded, slot.name)
                self._reference.forget()
            if "ebu_fisher" in mine and (started or self.mode == "fixed"):
                self.fisher[slot.key] = self.holding.fisher(_own(mine["ebu_fisher"], slot.param))
                self.count[slot.key] = int(mine.get("ebu_fisher_count", 0))
        if mean is not None and self.fisher:
            device = local(next(iter(self.fisher.values()))).device
            self.mean = torch.tensor(mean, dtype=torch.float64, device=device)


def _empty_fisher(p: Tensor) -> Tensor:
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros_like(p, dtype=wide)


def _own(loaded: Tensor, p: Tensor) -> Tensor:
    """Return a copy of a checkpoint's tensor, sharded like its parameter."""
    return spread(loaded.to(p.device, copy=True), p)
