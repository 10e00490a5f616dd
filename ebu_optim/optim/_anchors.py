"""theta0 and F: what penalties need, kept by tensor and never in the base's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules import tensor_hash
from . import _checks
from ._holding import Holding, TensorMap
from ._shards import Shards, is_sharded, local, local_gradient, spread
from ._slots import Key, Slot


class Anchors:
    """The anchor theta0 and the Fisher F of every trainable parameter.

    Args:
        slots: the optimizer's parameters.
        fisher: "online", None or a mapping; see EBUOptimizer.
        anchor: a mapping, or None to take theta0 at the first phase.
        used: whether the rule has a penalty; False holds what is given and takes nothing.
        unit: scale F by 1 / sqrt(mean F).
        holding: how theta0 and F are held.

    Attributes:
        mode: "online", "warm" (an online F, frozen), "fixed" (a mapping) or "none".
        anchor, fisher: by key, those of tensors that have left the groups too.
        count: by key, the batches that an online F is the mean of.
        mean: 0-d float64 mean of F where it is known; None makes it be computed anew.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        fisher: str | TensorMap | None,
        anchor: TensorMap | None,
        used: bool,
        unit: bool,
        holding: Holding | None = None,
    ) -> None:
        self.used, self.unit, self.holding = used, unit, holding or Holding()
        self.holding.check()
        self._hash: tuple[tuple[Key, ...], str] | None = None
        self._present = {s.key for s in slots}
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

    @torch.no_grad()
    def take(self, slots: Sequence[Slot]) -> None:
        """At a step's first phase: theta0 and an empty F for what is trained and has none yet."""
        for key, _, p, name, _ in slots:
            held = self.anchor.get(key)
            held = self.fisher.get(key) if held is None else held  # they have one shape
            if held is None:
                continue
            if held.shape != p.shape:
                raise ValueError(
                    f"{name} has shape {tuple(p.shape)} but its theta0 or F has shape "
                    f"{tuple(held.shape)}: the parameter changed shape; build a new EBUOptimizer "
                    "for the new model"
                )
            if is_sharded(p):  # since they were given?
                for own in (self.anchor, self.fisher):
                    if key in own:
                        own[key] = spread(own[key], p)
        self._look(slots)
        if not self.active and not self.anchor:
            return
        if slots and not any(slot.param.requires_grad for slot in slots):
            raise RuntimeError(
                "none of the optimizer's parameters requires a gradient, so theta0 and F would be "
                "kept for none and the penalty be missing: unfreeze the model, or call "
                "requires_grad_() on master copies that are given their gradients by hand"
            )
        self.hold(slots)

    @torch.no_grad()
    def hold(self, slots: Iterable[Slot], by_hand: bool = False) -> None:
        """theta0 and an empty F for what is trained and has none yet, in whatever phase.

        Weights stand still between a step's first phase and its end, so what is first trained in
        a later phase is as it was at the first.

        Args:
            by_hand: also for what requires no gradient, as it was given one.
        """
        if not self.active and not self.anchor:
            return
        slots = list(slots)
        keys = {s.key for s in slots}
        if self.anchor.keys() >= keys and not (self.active and keys - self.fisher.keys()):
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

    def _look(self, slots: Iterable[Slot]) -> None:
        """Which parameters are in the groups; the mean of F is over these."""
        present = {s.key for s in slots}
        if present != self._present and (present ^ self._present) & self.fisher.keys():
            self.mean = None
        self._present = present

    def scale(self, shards: Shards) -> Tensor | float:
        """What gamma is multiplied by: 1 / sqrt(mean F) (0 while F is 0), or 1 for "raw"."""
        held = {key: f for key, f in self.fisher.items() if key in self._present}
        if not self.unit or not held:
            return 1.0
        if self.mean is None:
            device = local(next(iter(held.values()))).device
            total = torch.zeros((), dtype=torch.float64, device=device)
            for key, f in held.items():
                if shards.counts(key):
                    total += local(f).sum(dtype=torch.float64).to(device)
            shards.add(total)
            self.mean = total / sum(f.numel() for f in held.values())
        return torch.where(self.mean > 0, self.mean.rsqrt(), 0.0)

    def online_weight(self, key: Key) -> float | None:
        """Weight of the next squared gradient in the cumulative mean; None where F is fixed."""
        return 1 / (self.count.get(key, 0) + 1) if self.mode == "online" and self.active else None

    def pull(self, slot: Slot, like: Tensor, scale: Tensor | float) -> Tensor:
        """F (theta - theta0) of one parameter in the dtype and place of `like`, F times `scale`."""
        anchor, fisher = (local(m[slot.key]).to(like) for m in (self.anchor, self.fisher))
        scale = scale.to(like) if isinstance(scale, Tensor) else scale
        return fisher * scale * (slot.param.to(like) - anchor)

    def average(self, slots: Iterable[Slot], squares: Iterable[Tensor]) -> None:
        """Squares of the remember gradients go into an online F."""
        slots = list(slots)
        for slot, square in zip(slots, squares, strict=True):
            f, weight = local(self.fisher[slot.key]), self.online_weight(slot.key)
            square = square.to(f.device)
            f.copy_(torch.lerp(f.to(square), square, weight or 0.0))
        self.counted((s.key for s in slots), None)

    def counted(self, keys: Iterable[Key], mean: Tensor | None) -> None:
        """One more square has gone into the F of `keys`; their mean, None where not known."""
        keys = set(keys)
        for key in keys:
            self.count[key] = self.count.get(key, 0) + 1
        self.mean = mean if keys >= self._present & self.fisher.keys() else None

    @torch.no_grad()
    def warm(self, slots: Iterable[Slot]) -> None:
        """Average the squares of the gradients that lie on the parameters into F."""
        slots = list(slots)
        self.hold((s for s in slots if s.param.grad is not None), by_hand=True)
        for slot in slots:
            if slot.key in self.fisher:
                f, g = local(self.fisher[slot.key]), local_gradient(slot.param.grad, slot.param)
                wide = torch.promote_types(f.dtype, torch.float32)
                square = torch.zeros_like(f, dtype=wide) if g is None else g.to(wide).square()
                n = self.count[slot.key] = self.count.get(slot.key, 0) + 1
                f.copy_(f.to(wide).lerp_(square.to(f.device), 1 / n))
        self.mean = None

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        """What a checkpoint holds. A tensor that is not made yet stands as what it would be made
        of now, so that a tool which only fills the keys it finds fills ours."""
        own: dict[Key, dict[str, Tensor]] = {}
        slots = list(slots)
        self._look(slots)
        for key, _, p, _, _ in slots:
            mine = own.setdefault(key, {})
            wanted = self.active and p.requires_grad
            if self.holding.anchor_source is not None:
                pass
            elif key in self.anchor:
                mine["ebu_anchor"] = self.anchor[key].contiguous()
            elif wanted:
                mine["ebu_anchor"] = self.holding.anchor(p.detach().clone(), "").contiguous()
            if key in self.fisher:
                mine["ebu_fisher"] = self.fisher[key]
            elif wanted and self.mode == "online":
                mine["ebu_fisher"] = self.holding.fisher(_empty_fisher(p))
            if "ebu_fisher" in mine and self.mode != "fixed":
                mine["ebu_fisher_count"] = torch.tensor(self.count.get(key, 0))
        return own

    def reference(self, keys: Iterable[Key]) -> dict[str, Any]:
        """For the checkpoint: where theta0 comes from, and its hash over `keys` in that order once
        it is known."""
        if self.holding.anchor_source is None:
            return {}
        order = tuple(key for key in keys if key in self.anchor)
        if order and (self._hash is None or self._hash[0] != order):
            if any(is_sharded(self.anchor[key]) for key in order):
                raise ValueError(
                    "anchor_source with sharded parameters: no process holds all of theta0 to hash "
                    "it; leave anchor_source out and save with torch.distributed.checkpoint"
                )
            self._hash = order, tensor_hash(*(self.anchor[key] for key in order))
        found = self._hash[1] if self._hash and order else None
        return {"ebu_anchor_source": self.holding.anchor_source, "ebu_anchor_hash": found}

    def check_reference(self, counters: Mapping[str, Any], keys: Iterable[Key]) -> None:
        """Raise unless theta0 is here where a checkpoint only names it.

        Args:
            counters: of the checkpoint.
            keys: in the order of the checkpoint, which its hash has.
        """
        source, saved = (counters.get(f"ebu_anchor_{n}") for n in ("source", "hash"))
        if source is None or saved is None:
            return
        here = self.reference(keys) if self.anchor_given else {}
        remedy = (
            f"build EBUOptimizer(..., anchor=<the weights of {source}>, anchor_source={source!r}) "
            "with the same anchor_dtype"
        )
        if not here:
            raise ValueError(f"the checkpoint holds theta0 by reference to {source!r}: {remedy}")
        if here["ebu_anchor_hash"] != saved:
            raise ValueError(
                f"the anchor given is not the theta0 of the checkpoint ({source!r}, hash {saved}; "
                f"given: {here['ebu_anchor_hash']}): {remedy}"
            )

    def load(
        self,
        own: Mapping[Key, Mapping[str, Tensor]],
        slots: Iterable[Slot],
        *,
        started: bool,
        frozen: bool,
        mean: float | None,
    ) -> None:
        """Take a checkpoint's tensors; one from before the first phase undoes what was taken."""
        if self.mode != "fixed":
            self.fisher, self.count = {}, {}
        if self.mode in ("online", "warm"):
            self.mode = "warm" if frozen else "online"
        by_reference = self.holding.anchor_source is not None and self.anchor_given
        if (started or not self.anchor_given) and not by_reference:
            self.anchor, self._hash = {}, None
        slots = list(slots)
        self._present, self.mean = {s.key for s in slots}, None
        for slot in slots:
            mine = own.get(slot.key, {})
            if started and "ebu_anchor" in mine:
                loaded = _own(mine["ebu_anchor"], slot.param)
                self.anchor[slot.key] = self.holding.anchor(loaded, slot.name)
                self._hash = None
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
    """A copy of a checkpoint's tensor, laid out as its parameter is."""
    return spread(loaded.to(p.device, copy=True), p)
