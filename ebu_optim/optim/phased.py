"""PhasedOptimizer: two gradients, one step of any torch optimizer. It knows no method."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._compile import _disable_dynamo

from .. import kernels
from ..errors import NonFiniteError
from . import _checks, _ranks
from ._gradients import Grads, put, with_gradients
from ._shards import Shards, is_sharded, like, local, local_gradient
from ._slots import SlotList
from ._wrapped import WrappedOptimizer
from .rule import Combined, Step

Closure = Callable[[], Any]


class PhasedOptimizer(WrappedOptimizer):
    """Any torch optimizer on what a rule makes of two gradients.

    It owns the phases, GradScaler, ranks and shards, clipping, the policy for NaN and Inf, theta0
    and F, statistics and the state; the :class:`~ebu_optim.optim.Rule` says what G is.
    :class:`~ebu_optim.EBUOptimizer` and every baseline are one of these.

    Args:
        base: a built optimizer over dense real floating parameters; see EBUOptimizer.
        rule: what G is.
        fisher, fisher_scale, anchor: F and theta0 for a rule with a penalty; see EBUOptimizer.
        max_grad_norm: clip G to this 2-norm; None does not clip.
        nonfinite: on NaN or Inf in a gradient or in G ``"raise"``, ``"skip"`` the step (counted in
            ``skipped_steps``) or ``"propagate"``.
        holding: how theta0 and F are held; see EBUOptimizer.

    Raises:
        TypeError: ``base`` is not a torch optimizer or needs a closure; sparse or complex tensors.
        ValueError: an option out of range; a mapping that does not fit the parameters.
    """

    #: The phases that a step needs; a loop may leave out the other (see `ebu_optim.baselines`).
    needs: tuple[str, ...] = ("forget", "remember")
    rank_checks: int = 3  # accepted steps still to be compared; the same on all ranks
    # GradScaler then calls step with the scale and its findings instead of unscaling param.grad
    # itself, which is one of the two gradients only.
    _step_supports_amp_scaling = True

    # -- phases ---------------------------------------------------------------------------------

    def forget(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the forget loss in here, once per micro-batch.

        Leaving takes the gradients off the parameters, entering again puts them back first.

        Raises:
            RuntimeError: phases nest; a gradient lies there that belongs to no phase.
            TypeError: a sparse or complex gradient; a parameter that has become a shard.
        """
        return self._phases.phase("forget")

    def remember(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the remember loss in here; see `forget`."""
        return self._phases.phase("remember")

    # -- step -----------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        forget: Closure | None = None,
        remember: Closure | None = None,
        *,
        closure: Closure | None = None,
    ) -> tuple[Any, Any] | None:
        """One step, from two closures or from the phases that ran before.

        Args:
            forget, remember: run forward and backward of their loss and return it. One that calls
                zero_grad itself is harmless.
            closure: None, or after the phases one that makes no gradient: Lightning's manual
                optimization passes such a closure by name, and torch's checkpoint tools pass None.

        Returns:
            The values that the two closures returned (None for one that `needs` leaves out, which
            is not called); None after phases.

        Raises:
            TypeError: a single closure.
            RuntimeError: a phase is missing or made no gradient; gradients were touched between
                the phases and the step; NaN or Inf with ``nonfinite="raise"``; the ranks of
                torch.distributed differ.
        """
        losses = None
        if closure is not None and forget is remember is None and self._phases.complete:
            with torch.enable_grad():
                closure()  # what it does to the gradients is an error below
            closure = None
        given = {"forget": forget, "remember": remember}
        wanted = {name: call for name in self.needs if (call := given[name]) is not None}
        some = forget is not None or remember is not None
        if closure is not None or (some and len(wanted) < len(self.needs)):
            count, takes, names = (
                ("two closures", "forget=..., remember=...", "phases forget() and remember()")
                if len(self.needs) == 2
                else ("one closure", f"{self.needs[0]}=...", f"phase {self.needs[0]}()")
            )
            raise TypeError(
                f"{type(self).__name__}.step takes {count}, step({takes}), or none after the "
                f"{names}; it got {'another' if len(self.needs) == 1 else 'one'}. In Lightning use "
                "manual optimization; through a prepared accelerate optimizer use the phases"
            )
        if some:
            found = {}
            try:
                with torch.enable_grad():
                    for name, call in wanted.items():
                        with self._phases.phase(name):
                            found[name] = call()
            except BaseException:
                self._phases.discard()
                raise
            losses = (found.get("forget"), found.get("remember"))
        elif not self._phases.done and all(_is_zero(g.get("lr", 1)) for g in self.param_groups):
            # torch.distributed.checkpoint initialises the base's state by such a call
            self.base.step()
            return None
        try:
            self._apply()
        except BaseException:
            # GradScaler takes them away after a step only; the next one would use them again
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return losses

    @_disable_dynamo  # as torch.optim has it: in compiled code a step is one graph break
    @torch.no_grad()
    def _apply(self) -> None:
        phases = self._phases
        # of GradScaler, for the time of a step
        scale, found_inf = (self.__dict__.get(name) for name in ("grad_scale", "found_inf"))
        scaler = found_inf is not None
        slots = phases.look()
        if scaler and scale is None:
            phases.discard()
            raise RuntimeError(
                "scaler.unscale_() was called between the phases and step (accelerate's "
                "clip_grad_norm_ does so): it reaches one of the two gradients only. Clip with "
                "EBUOptimizer(max_grad_norm=...) and leave unscaling to scaler.step()"
            )
        if phases.complete and phases.active is None:
            phases.check_untouched(slots)
        phases.require_all()
        for group in self.param_groups:
            _checks.group(group)
        _checks.direction(self.param_groups, self._anchors.active)
        _checks.capture(self.nonfinite, self._anchors.mode if self._anchors.active else "none")
        phases.unpoison()

        slots, g_f, g_r = with_gradients(slots, phases.of("forget"), phases.of("remember"))
        shown = g_f if phases.shown == "forget" else g_r
        self._anchors.hold(slots, by_hand=True)
        if slots.sharded:
            g_f, g_r = (list(map(local_gradient, g, slots.params)) for g in (g_f, g_r))
        compared = self.rank_checks > 0 and self._compare_ranks(g_f, g_r)
        combined = None
        # the scaler has seen both gradients where the hidden one was probed
        seen, phases.probes = scaler and phases.probes, scaler
        if found_inf is None or not found_inf.item():
            combined = self._combine(slots, g_f, g_r, scaler, seen)
        self.last_step_skipped = combined is None
        if combined is None:
            self.skipped_steps += 1
        else:
            self._last = combined.last
            grads = combined.grads
            if slots.sharded:
                grads = list(map(like, grads, slots.params))
            put(slots.params, shown, grads)
            try:
                self.base.step()
            except BaseException:
                phases.discard()
                raise
            if combined.held is not None:
                params = slots.local().params
                kernels.backend(params, self.rule.fused).restore(params, combined.held)
            self._step_count += 1
            self.rank_checks -= compared
        phases.close()

    def _compare_ranks(self, g_f: Grads, g_r: Grads) -> bool:
        """True where there are ranks and they agree. It comes before any may skip or raise.

        Of sharded parameters, which differ from rank to rank, the layout is compared.
        """
        if _ranks.alone():
            return False
        slots = [s for s in self._slots() if s.param.requires_grad]
        # by place: the keys of a process that was resumed may be others
        own = ("fisher_scale", "nonfinite", "max_grad_norm")
        options: list[Any] = [*self.rule.options.items(), *(getattr(self, n) for n in own)]
        options += [(s.place, *(s.group[name] for name in self._defaults)) for s in slots]
        whole = {s.key for s in slots if not is_sharded(s.param)}
        options += [
            (s.place, tuple(s.param.shape), str(s.param.placements))  # type: ignore[attr-defined]
            for s in slots
            if s.key not in whole
        ]
        anchor, fisher = (
            [held[s.key] for s in slots if s.key in whole and s.key in held]
            for held in (self._anchors.anchor, self._anchors.fisher)
        )
        if len(whole) < len(slots):
            g_f, g_r = [], []
        try:
            _ranks.same_on_all_ranks(
                [s.param for s in slots if s.key in whole],
                g_f,
                g_r,
                getattr(self, "grad_scale", None),
                anchor,
                fisher,
                options,
                local(slots[0].param).device,
            )
        except RuntimeError:
            self._phases.discard()
            raise
        return True

    def _combine(
        self,
        slots: SlotList,
        g_f: Grads,
        g_r: Grads,
        scaler: bool,
        seen: bool,
    ) -> Combined | None:
        """G and what belongs to it; None where the step is to be skipped."""
        step = Step(
            slots.local(),
            g_f,
            g_r,
            self.grad_scale.double().reciprocal() if scaler else None,
            Shards(slots),
            self._anchors,
            self._step_count,
        )
        looks = self.nonfinite != "propagate"
        if (looks or scaler) and not seen:
            f, r = self.rule.nonfinite(step).tolist()
            if (f or r) and self._skips(
                f"non-finite gradients: {f} elements of the forget gradient, {r} of the remember "
                "gradient are NaN or Inf; nothing was changed"
            ):
                return None
        combined = self.rule.combine(step)
        square = combined.update_sq
        if looks:
            nonfinite, norm_sq = torch.stack([combined.nonfinite, square]).tolist()
            exceeded = nonfinite or (self.max_grad_norm and not math.isfinite(norm_sq))
            if exceeded and self._skips(
                "non-finite combined gradient: the two gradients are finite, but what "
                f"{type(self).__name__} makes of them exceeds what its dtype holds (65504 in "
                "float16), or the norm to clip it by does; no weight was changed. Scale the losses "
                "or strengths down, or use float32 or bfloat16 weights"
            ):
                return None
        self.rule.accepted(step)
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            kernels.reference.scale(combined.grads, factor)
        return combined

    def _skips(self, message: str) -> bool:
        """True where the step is to be skipped; raises where `nonfinite` says so."""
        if self.nonfinite == "skip" or getattr(self, "found_inf", None) is not None:
            return True
        self._phases.discard()
        raise NonFiniteError(f'{message}. Use nonfinite="skip" to drop such steps')

    # -- reading --------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Figures of the last accepted step, {} before the first; reading waits for the device.

        total (scalars that had a gradient); forget_norm, remember_norm (where the method needs that
        gradient) and cosine (where it needs both); update_norm, that of G before clipping; moved,
        the distance from theta0 before the step (where it is held); and the method's own: those of
        EBU are in docs/method.md.
        """
        return {} if self._last is None else self.rule.read(self._last)


def _is_zero(lr: Any) -> bool:
    return float(lr) == 0
