"""What the baselines share: one shape with EBUOptimizer, and a rule of a few lines each.

A baseline says what the update G is of two gradients; phases, closures, GradScaler, accumulation,
checkpoints and clipping are EBUOptimizer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _checks
from .._combine import Combined
from .._phases import Slot
from .._shards import Shards, local
from ..kernels import reference
from ..optimizer import EBUOptimizer, TensorMap

Figures = dict[str, Any]


class Step(NamedTuple):
    """A step's gradients as they came, and the figures over all scalars of the model.

    Attributes:
        slots: with local parameters; those that have at least one of the two gradients.
        g_f, g_r: per slot, missing ones as zeros, loss scale not undone.
        scale: what undoes the loss scale, a float or a 0-d tensor.
        dot, forget_sq, remember_sq: <g_f, g_r>, |g_f|^2 and |g_r|^2 with the loss scale undone,
            0-d float64.
        shards: how parts of parameters count together.
    """

    slots: Sequence[Slot]
    g_f: Sequence[Tensor]
    g_r: Sequence[Tensor]
    scale: Tensor | float
    dot: Tensor
    forget_sq: Tensor
    remember_sq: Tensor
    shards: Shards


class Rule(EBUOptimizer):
    """A method whose update is a small rule on (g_f, g_r, theta, theta0, F).

    A subclass gives `rule`, and `begin` where it needs figures over the whole model first. What it
    is told as ``options`` lives in the parameter groups as ``ebu_<name>``, where it can be
    scheduled, is saved, and is compared over the ranks.

    Args:
        base, max_grad_norm, nonfinite: as of EBUOptimizer.
        options: the method's own numbers, by name.
        fisher, fisher_scale, anchor, penalty: as of EBUOptimizer, for rules that use F and theta0.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        options: Mapping[str, Any],
        max_grad_norm: float | None,
        nonfinite: str,
        fisher: str | TensorMap | None = None,
        fisher_scale: str = "raw",
        anchor: TensorMap | None = None,
        penalty: str = "none",
    ) -> None:
        own = {f"ebu_{name}": value for name, value in options.items()}
        _checks.base(base)
        _checks.group(own)
        for group in base.param_groups:
            for name, value in own.items():
                group.setdefault(name, value)
        super().__init__(
            base, fisher=fisher, fisher_scale=fisher_scale, anchor=anchor, penalty=penalty,
            max_grad_norm=max_grad_norm, nonfinite=nonfinite, fused=False,
        )  # fmt: skip
        for group in self.param_groups:
            for name in self._defaults.keys() - own.keys():
                group.pop(name, None)  # an alpha that nothing reads
        self._defaults = own
        self._fisher_scale: Tensor | float = 1.0
        self._figures: Figures = {}

    # -- what a method is -----------------------------------------------------------------------

    def begin(self, step: Step) -> Figures:
        """Before the first parameter of a step: figures for `rule`. `stats` shows those whose name
        has no leading underscore: numbers or 0-d tensors."""
        return {}

    def rule(self, slot: Slot, g_f: Tensor, g_r: Tensor, figures: Figures) -> Tensor:
        """G of one parameter from its two gradients (float32 or float64, loss scale undone)."""
        raise NotImplementedError(f"{type(self).__name__}.rule")

    def moves(self, slot: Slot) -> Tensor | None:
        """Which scalars of a parameter the step may move, bool; the rest is kept bit-identical
        through the base step. None: all."""
        return None

    def _set(self, name: str, value: Any) -> None:
        if name not in self._defaults:
            raise AttributeError(f"{type(self).__name__} has no {name.removeprefix('ebu_')}")
        super()._set(name, value)

    # -- what the rules use ---------------------------------------------------------------------

    def pull(self, slot: Slot, like: Tensor) -> Tensor:
        """F (theta - theta0) of one parameter, F scaled as `fisher_scale` says."""
        held = self._penalty
        anchor, fisher = (local(m[slot.key]).to(like) for m in (held.anchor, held.fisher))
        scale = self._fisher_scale
        scale = scale.to(like) if isinstance(scale, Tensor) else scale
        return fisher * scale * (slot.param.to(like) - anchor)

    # -- the step -------------------------------------------------------------------------------

    def _combine(
        self,
        slots: Sequence[Slot],
        g_f: Sequence[Tensor | None],
        g_r: Sequence[Tensor | None],
        scaler: bool,
    ) -> Combined | None:
        shards = Shards(slots)
        slots = [s._replace(param=local(s.param)) for s in slots]
        if self.needs == ("forget",):  # the only gradient lies where g_r does
            g_f, g_r = g_r, g_f
        scale = self.grad_scale.double().reciprocal() if scaler else 1.0
        step = _measure(slots, g_f, g_r, scale, shards)
        if not scaler and self._refused(
            torch.stack([step.forget_sq, step.remember_sq]).isfinite().all(),
            "non-finite gradients: NaN or Inf in {}; nothing was changed",
            lambda: _where(step),
        ):
            return None
        online = self._penalty.mode == "online" and self._penalty.active
        self._fisher_scale = self._penalty.scale(shards)
        figures = self.begin(step)
        out, update_sq, moved_sq = [], [], []
        held: list[Tensor] = []
        for i, slot in enumerate(slots):
            f, r = (_wide(g[i], scale) for g in (step.g_f, step.g_r))
            G = self.rule(slot, f, r, figures)
            # the spent forget gradient receives G; g_r is used once more by an online F
            spent = (g_f[i], g_r[i]) if not online else (g_f[i], None)
            buffer = next((t for t in spent if t is not None), None)
            buffer = torch.empty_like(slot.param) if buffer is None else buffer
            out.append(buffer.copy_(G))
            if shards.counts(slot.key):
                update_sq.append(_square(buffer))
                if slot.key in self._penalty.anchor:
                    anchor = local(self._penalty.anchor[slot.key]).to(slot.param.device)
                    moved_sq.append(_square(slot.param.double() - anchor))
            movable = self.moves(slot)
            if movable is not None:
                held.append(slot.param.masked_fill(movable, math.nan))
        totals = torch.stack([_sum(update_sq, slots), _sum(moved_sq, slots)])
        shards.add(totals)
        if self._refused(
            totals[0].isfinite(),
            "non-finite update: the gradients are finite, but what {} makes of them exceeds its "
            "dtype; no weight was changed. Scale the losses or strengths down",
            lambda: type(self).__name__,
        ):
            return None
        if online:
            self._average(slots, step)
        if self.max_grad_norm is not None:
            norm = totals[0].sqrt()
            reference.scale(out, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float())
        self._figures = {n: v for n, v in figures.items() if not n.startswith("_")}
        vector = torch.stack([step.dot, step.forget_sq, step.remember_sq, *totals])
        return Combined(out, held or None, (vector, vector[:0], sum(map(shards.numel, slots))))

    def _refused(self, finite: Tensor, message: str, what: Any) -> bool:
        """True where the step is to be skipped; raises where `nonfinite` says so."""
        if self.nonfinite == "propagate" or bool(finite):
            return False
        if self.nonfinite == "skip" or getattr(self, "found_inf", None) is not None:
            return True
        self._phases.discard()
        raise RuntimeError(message.format(what()) + '. Use nonfinite="skip" to drop such steps')

    def _average(self, slots: Sequence[Slot], step: Step) -> None:
        """The squares of g_r go into an online F."""
        held = self._penalty
        for slot, g in zip(slots, step.g_r, strict=True):
            f, weight = local(held.fisher[slot.key]), held.online_weight(slot.key)
            square = _wide(g, step.scale).square_().to(f.device)
            f.copy_(torch.lerp(f.to(square), square, weight or 0.0))
        held.counted((s.key for s in slots), None)

    # -- reading --------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the last accepted step, {} before the first; reading waits for the device.

        total (scalars that had a gradient); forget_norm, remember_norm (where the method needs that
        gradient) and cosine (where it needs both); update_norm, |G| before clipping; moved,
        |theta - theta0| before the step (where theta0 is held); and the method's own.
        """
        if self._last is None:
            return {}
        vector, _, total = self._last
        dot, f, r, update, moved = vector.tolist()
        norms = math.sqrt(f) * math.sqrt(r)
        shown: dict[str, Any] = {"total": total}
        if "forget" in self.needs:
            shown["forget_norm"] = math.sqrt(f)
        if "remember" in self.needs:
            shown["remember_norm"] = math.sqrt(r)
        if len(self.needs) == 2:
            shown["cosine"] = dot / norms if norms else math.nan
        shown["update_norm"] = math.sqrt(update)
        if self._penalty.anchor:
            shown["moved"] = math.sqrt(moved)
        own = {k: v.item() if isinstance(v, Tensor) else v for k, v in self._figures.items()}
        return shown | own

    def __repr__(self) -> str:
        shown = {n.removeprefix("ebu_"): self.param_groups[0][n] for n in self._defaults}
        if self._penalty.active:
            shown |= {"fisher": self._penalty.mode, "fisher_scale": self.fisher_scale}
        shown |= {"max_grad_norm": self.max_grad_norm, "nonfinite": self.nonfinite}
        listed = ", ".join(f"{n}={v!r}" for n, v in shown.items())
        return f"{type(self).__name__}({listed})\nbase: {self.base!r}"


def compat(value: str | None) -> bool:
    """True for "paper", False for None."""
    if value is not None:
        _checks.choice("compat", value, ("paper",))
    return value is not None


def weight(name: str, value: Any) -> float:
    """A finite number >= 0."""
    number = _checks._number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}")
    return number


def _measure(
    slots: Sequence[Slot],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    scale: Tensor | float,
    shards: Shards,
) -> Step:
    zeros = [s.param.detach().new_zeros(()).expand(s.param.shape) for s in slots]
    dots, forget, remember = [], [], []
    for slot, f, r in zip(slots, g_f, g_r, strict=True):
        if not shards.counts(slot.key):
            continue
        if f is not None:
            forget.append(_square(f))
        if r is not None:
            remember.append(_square(r))
        if f is not None and r is not None:
            dots.append((f.double() * r).sum())
    totals = torch.stack([_sum(found, slots) for found in (dots, forget, remember)])
    shards.add(totals)
    totals *= scale**2
    full_f, full_r = (
        [z if g is None else g for g, z in zip(gs, zeros, strict=True)] for gs in (g_f, g_r)
    )
    dot, forget_sq, remember_sq = totals.unbind()
    return Step(slots, full_f, full_r, scale, dot, forget_sq, remember_sq, shards)


def _square(t: Tensor) -> Tensor:
    """|t|^2, 0-d float64: finite exactly where every element of a float32 or smaller t is."""
    return t.double().square().sum()


def _sum(parts: Sequence[Tensor], slots: Sequence[Slot]) -> Tensor:
    device = slots[0].param.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts:
        total += part.to(device)
    return total


def _wide(g: Tensor, scale: Tensor | float) -> Tensor:
    """In float32 at least, the loss scale undone; always a new tensor."""
    wide = torch.promote_types(g.dtype, torch.float32)
    return g.to(wide, copy=True).mul_(scale.to(g.device) if isinstance(scale, Tensor) else scale)


def _where(step: Step) -> str:
    counts = [
        (name, sum(int((~g.isfinite()).sum()) for g in grads))
        for name, grads in (("forget", step.g_f), ("remember", step.g_r))
    ]
    return " and ".join(f"{n} elements of the {name} gradient" for name, n in counts if n)
