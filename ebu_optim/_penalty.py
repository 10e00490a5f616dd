"""theta0 and F: what the penalty needs, kept by position and never in the base's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from . import _checks
from ._phases import Key, Slot
from ._shards import Shards, is_sharded, local, local_gradient, spread


class Penalty:
    """The anchor theta0 and the Fisher F of every trainable parameter.

    Args:
        slots: the optimizer's parameters.
        fisher: "online", None or a mapping; see EBUOptimizer.
        anchor: a mapping, or None to take theta0 at the first phase.
        kind: "partial", "full" or "none".
        unit: scale F by 1 / sqrt(mean F).

    Attributes:
        mode: "online", "warm" (an online F, frozen), "fixed" (a mapping) or "none".
        anchor, fisher: by position.
        count: by position, the batches that an online F is the mean of.
        mean: 0-d float64 mean of F where it is known; None makes it be computed anew.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        fisher: str | Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None,
        anchor: Mapping[str, Tensor] | Mapping[Tensor, Tensor] | None,
        kind: str,
        unit: bool,
    ) -> None:
        self.kind, self.unit = kind, unit
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
            self.fisher = _checks.tensor_map("fisher", fisher, slots, nonnegative=True)
        if anchor is not None:
            found = _checks.tensor_map("anchor", anchor, slots)
            self.anchor = {
                s.key: _compact(found[s.key].to(s.param.dtype, copy=True))
                for s in slots
                if s.key in found
            }

    @property
    def active(self) -> bool:
        return self.mode != "none" and self.kind != "none"

    @torch.no_grad()
    def take(self, slots: Sequence[Slot]) -> None:
        """At a first phase: theta0 and an empty F for every parameter that has none yet."""
        for slot in slots:
            p = slot.param
            for name, own in (("anchor", self.anchor), ("Fisher", self.fisher)):
                if slot.key in own and own[slot.key].shape != p.shape:
                    raise ValueError(
                        f"{slot.name} has shape {tuple(p.shape)} but its {name} has shape "
                        f"{tuple(own[slot.key].shape)}: the parameter changed shape; build a new "
                        "EBUOptimizer for the new model"
                    )
        if not self.active and not self.anchor:
            return
        if slots and not any(slot.param.requires_grad for slot in slots):
            raise RuntimeError(
                "none of the optimizer's parameters requires a gradient, so theta0 and F would be "
                "kept for none and the penalty be missing: unfreeze the model, or call "
                "requires_grad_() on master copies that are given their gradients by hand"
            )
        for slot in slots:
            p = slot.param
            if not p.requires_grad:
                continue
            if slot.key not in self.fisher and self.active:
                if self.mode == "fixed":
                    raise ValueError(
                        f"fisher has no tensor for {slot.name}, which was frozen when the "
                        "optimizer was built; build a new EBUOptimizer with a Fisher that covers it"
                    )
                self.fisher[slot.key] = _empty_fisher(p)
            if slot.key not in self.anchor:
                self.anchor[slot.key] = _compact(p.detach().clone())

    def scale(self, shards: Shards) -> Tensor | float:
        """What gamma is multiplied by: 1 / sqrt(mean F) (0 while F is 0), or 1 for "raw"."""
        if not self.unit or not self.fisher:
            return 1.0
        if self.mean is None:
            device = local(next(iter(self.fisher.values()))).device
            total = torch.zeros((), dtype=torch.float64, device=device)
            for key, f in self.fisher.items():
                if shards.counts(key):
                    total += local(f).sum(dtype=torch.float64).to(device)
            shards.add(total)
            self.mean = total / sum(f.numel() for f in self.fisher.values())
        return torch.where(self.mean > 0, self.mean.rsqrt(), 0.0)

    def online_weight(self, key: Key) -> float | None:
        """Weight of the next squared gradient in the cumulative mean; None where F is fixed."""
        return 1 / (self.count.get(key, 0) + 1) if self.mode == "online" and self.active else None

    def counted(self, keys: Iterable[Key], mean: Tensor | None) -> None:
        """One more square has gone into the F of `keys`; their mean, None where not known."""
        keys = set(keys)
        for key in keys:
            self.count[key] = self.count.get(key, 0) + 1
        self.mean = mean if keys >= self.fisher.keys() else None

    @torch.no_grad()
    def warm(self, slots: Iterable[Slot]) -> None:
        """Average the squares of the gradients that lie on the parameters into F."""
        for slot in slots:
            if slot.key in self.fisher:
                f, g = local(self.fisher[slot.key]), local_gradient(slot.param.grad, slot.param)
                square = torch.zeros_like(f) if g is None else g.to(f.dtype).square()
                n = self.count[slot.key] = self.count.get(slot.key, 0) + 1
                f.lerp_(square, 1 / n)
        self.mean = None

    # -- checkpoints ------------------------------------------------------------------------------

    def state(self, slots: Iterable[Slot]) -> dict[Key, dict[str, Tensor]]:
        """What a checkpoint holds. A tensor that is not made yet stands as what it would be made
        of now, so that a tool which only fills the keys it finds fills ours."""
        own: dict[Key, dict[str, Tensor]] = {}
        for key, _, p, _ in slots:
            mine = own.setdefault(key, {})
            wanted = self.active and p.requires_grad
            if key in self.anchor:
                mine["ebu_anchor"] = self.anchor[key].contiguous()
            elif wanted:
                mine["ebu_anchor"] = p.detach().clone()
            if key in self.fisher:
                mine["ebu_fisher"] = self.fisher[key]
            elif wanted and self.mode == "online":
                mine["ebu_fisher"] = _empty_fisher(p)
            if "ebu_fisher" in mine and self.mode != "fixed":
                mine["ebu_fisher_count"] = torch.tensor(self.count.get(key, 0))
        return own

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
        if started or not self.anchor_given:
            self.anchor = {}
        self.mean = None
        for slot in slots:
            mine = own.get(slot.key, {})
            if started and "ebu_anchor" in mine:
                self.anchor[slot.key] = _compact(_own(mine["ebu_anchor"], slot.param))
            if "ebu_fisher" in mine and (started or self.mode == "fixed"):
                self.fisher[slot.key] = _own(mine["ebu_fisher"], slot.param)
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


def _compact(t: Tensor) -> Tensor:
    """One expanded zero where theta0 is zero (LoRA's B): nothing is stored for it."""
    if t.numel() and not is_sharded(t) and not t.count_nonzero():
        return t.new_zeros(()).expand(t.shape)
    return t
