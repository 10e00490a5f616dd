"""theta0 and F: what penalties need, kept by position and never in the base's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import tensor_hash
from . import _checks
from ._shards import Shards, is_sharded, local, local_gradient, spread
from ._slots import Key, Slot

TensorMap = Mapping[str, Tensor] | Mapping[Tensor, Tensor]


class Holding(NamedTuple):
    """In what dtype, where and in whose name theta0 and F are held; see EBUOptimizer."""

    anchor_dtype: torch.dtype | None = None
    fisher_dtype: torch.dtype | None = None
    held_on: str | None = None
    anchor_source: str | None = None

    def check(self) -> None:
        half = (None, torch.float16, torch.bfloat16)
        if self.anchor_dtype not in half:
            raise ValueError(
                "anchor_dtype must be torch.float16, torch.bfloat16 or None (the parameter's); "
                f"got {self.anchor_dtype!r}"
            )
        if self.fisher_dtype not in (None, torch.bfloat16):
            raise ValueError(
                "fisher_dtype must be torch.bfloat16 or None (float32): float16 would turn an F "
                f"below 6e-8 into 0; got {self.fisher_dtype!r}"
            )
        if self.held_on not in (None, "cpu"):
            raise ValueError(
                f'held_on must be "cpu" or None (beside the parameters); got {self.held_on!r}'
            )
        if self.anchor_source is not None and not isinstance(self.anchor_source, str):
            raise TypeError(
                f"anchor_source must be a string, a hub id or a path; got {self.anchor_source!r}"
            )

    def anchor(self, t: Tensor, name: str) -> Tensor:
        """theta0 as it is to be held."""
        held = self._place(t, self.anchor_dtype or t.dtype)
        if self.anchor_dtype and not local(held).isfinite().all() and local(t).isfinite().all():
            raise ValueError(
                f"anchor_dtype={self.anchor_dtype} does not hold {name}, whose largest weight is "
                f"{local(t).abs().max().item():g}: use torch.bfloat16 or None"
            )
        return _compact(held)

    def fisher(self, t: Tensor) -> Tensor:
        """F as it is to be held."""
        return self._place(t, self.fisher_dtype or t.dtype)

    def _place(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        if self.held_on is None or t.device.type == self.held_on:
            return t.to(dtype)
        if is_sharded(t):
            raise ValueError(
                'held_on="cpu" with sharded parameters: use the CPUOffloadPolicy of fully_shard'
            )
        held = torch.empty(t.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        return held.copy_(t)


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
        anchor, fisher: by position.
        count: by position, the batches that an online F is the mean of.
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
        self._hash: str | None = None
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
                if slot.key in own:  # sharded since it was given?
                    own[slot.key] = spread(own[slot.key], p)
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
                self.fisher[slot.key] = self.holding.fisher(_empty_fisher(p))
            if slot.key not in self.anchor:
                self.anchor[slot.key] = self.holding.anchor(p.detach().clone(), slot.name)
                self._hash = None

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
        self.mean = mean if keys >= self.fisher.keys() else None

    @torch.no_grad()
    def warm(self, slots: Iterable[Slot]) -> None:
        """Average the squares of the gradients that lie on the parameters into F."""
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
        for key, _, p, _ in slots:
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

    def reference(self) -> dict[str, Any]:
        """For the checkpoint: where theta0 comes from, and its hash once it is known."""
        if self.holding.anchor_source is None:
            return {}
        if self._hash is None and self.anchor:
            if any(is_sharded(t) for t in self.anchor.values()):
                raise ValueError(
                    "anchor_source with sharded parameters: no process holds all of theta0 to hash "
                    "it; leave anchor_source out and save with torch.distributed.checkpoint"
                )
            self._hash = tensor_hash(*(self.anchor[key] for key in sorted(self.anchor)))
        return {"ebu_anchor_source": self.holding.anchor_source, "ebu_anchor_hash": self._hash}

    def check_reference(self, counters: Mapping[str, Any]) -> None:
        """Raise unless theta0 is here where a checkpoint only names it."""
        source, saved = (counters.get(f"ebu_anchor_{n}") for n in ("source", "hash"))
        if source is None or saved is None:
            return
        here = self.reference() if self.anchor_given else {}
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
        self.mean = None
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


def _compact(t: Tensor) -> Tensor:
    """One expanded zero where theta0 is zero (LoRA's B): nothing is stored for it."""
    if t.numel() and not is_sharded(t) and not t.count_nonzero():
        return t.new_zeros(()).expand(t.shape)
    return t
