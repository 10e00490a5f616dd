"""PhasedOptimizer: two gradients, one step of any torch optimizer, independent of the method."""

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
    """Any torch optimizer, stepping on the gradient G that a rule makes from two gradients.

    This class handles the phases, GradScaler, ranks and shards, clipping, the policy for NaN and
    Inf, theta0 and F, statistics and the state. The :class:`~ebu_optim.optim.Rule` defines G.
    :class:`~ebu_optim.EBUOptimizer` and every baseline are subclasses.

    Args:
        base: an optimizer over dense real floating parameters; see EBUOptimizer.
        rule: how G is made.
        fisher, fisher_scale, anchor: F and theta0 for a rule with a penalty; see EBUOptimizer.
        max_grad_norm: clip G to this 2-norm; None does not clip.
        nonfinite: on NaN or Inf in a gradient or in G, ``"raise"``, ``"skip"`` the step (counted in
            ``skipped_steps``) or ``"propagate"``.
        holding: how theta0 and F are held; see EBUOptimizer.

    Raises:
        TypeError: ``base`` is not a torch optimizer or needs a closure; a tensor is sparse or
            complex.
        ValueError: an option is out of range; a mapping does not fit the parameters.
    """

    #: The phases that a step needs; a loop may omit the other one (see `ebu_optim.baselines`).
    needs: tuple[str, ...] = ("forget", "remember")
    rank_checks: int = 3  # how many more accepted steps to compare; the same on all ranks
    # With this, GradScaler passes its scale and its findings to step. Otherwise it would unscale
    # param.grad itself, which holds only one of the two gradients.
    _step_supports_amp_scaling = True

    # -- phases ---------------------------------------------------------------------------------

    def forget(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the forget loss inside this context.

        It may be entered once per micro-batch: leaving it takes the gradients off the parameters,
        and entering it again puts them back first.

        Raises:
            RuntimeError: phases are nested, or a parameter has a gradient from outside the phases.
            TypeError: a gradient is sparse or complex, or a parameter has become sharded in a way
                that is not supported.
        """
        return self._phases.phase("forget")

    def remember(self) -> AbstractContextManager[None]:
        """Run the forward and backward passes of the remember loss inside; see `forget`."""
        return self._phases.phase("remember")

    # -- step -----------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self,
        forget: Closure | None = None,
        remember: Closure | None = None,
        *,
        closure: Closure | None = None,
    ) -> tuple[Any, Any] | None:
        """Take one step, from two closures or from the phases that ran before.

        Args:
            forget, remember: run forward and backward of their loss and return the loss. A closure
                may call zero_grad itself.
            closure: None, or after the phases a closure that makes no gradient. Lightning's manual
                optimization passes such a closure by name; torch's checkpoint tools pass None.

        Returns:
            The values that the two closures returned, None for a phase that `needs` leaves out (its
            closure is not called). After phases: None.

        Raises:
            TypeError: only one closure was given where two are needed.
            RuntimeError: a phase is missing or made no gradient; gradients were changed between
                the phases and the step; NaN or Inf with ``nonfinite="raise"``; the ranks of
                torch.distributed differ.
        """
        losses = None
        if closure is not None and forget is remember is None and self._phases.complete:
            with torch.enable_grad():
                closure()  # if it changes the gradients, an error is raised below
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
                "manual optimization; with a prepared accelerate optimizer use the phases"
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
            # torch.distributed.checkpoint makes such a call to initialize the base's state
            self.base.step()
            return None
        try:
            self._apply()
        except BaseException:
            # GradScaler removes them only after a step that ends; the next one would use them
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return losses

    @_disable_dynamo  # like torch.optim: in compiled code a step is one graph break
    @torch.no_grad()
    def _apply(self) -> None:
        phases = self._phases
        # GradScaler sets these for the time of a step
        scale, found_inf = (self.__dict__.get(name) for name in ("grad_scale", "found_inf"))
        scaler = found_inf is not None
        slots = phases.look()
        if scaler and scale is None:
            phases.discard()
            raise RuntimeError(
                "scaler.unscale_() was called between the phases and step (accelerate's "
                "clip_grad_norm_ does so), but it changes only one of the two gradients; clip with "
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
        # if a probe was added, the scaler has seen both gradients
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
        """Return True if there are other ranks and they agree.

        This comes before any rank may skip or raise. Sharded parameters differ from rank to rank,
        so only their layout is compared.
        """
        if _ranks.alone():
            return False
        slots = [s for s in self._slots() if s.param.requires_grad]
        # by place, because a resumed process may have other keys
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
        """Return G and its statistics; None if the step is to be skipped."""
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
                "non-finite combined gradient: the two gradients are finite, but the gradient that "
                f"{type(self).__name__} makes from them, or the norm to clip it by, exceeds the "
                "range of its dtype (65504 in float16); no weight was changed. Scale the losses "
                "or strengths down, or use float32 or bfloat16 weights"
            ):
                return None
        self.rule.accepted(step)
        if self.max_grad_norm is not None:
            factor = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
            kernels.reference.scale(combined.grads, factor)
        return combined

    def _skips(self, message: str) -> bool:
        """Return True if the step is to be skipped; raise if `nonfinite` says so."""
        if self.nonfinite == "skip" or getattr(self, "found_inf", None) is not None:
            return True
        self._phases.discard()
        raise NonFiniteError(f'{message}. Use nonfinite="skip" to drop such steps')

    # -- reading --------------------------------------------------------------------------------

    @property
    def stats(self) -> dict[str, Any]:
        """Statistics of the last accepted step, {} before the first. Reading waits for the device.

        The keys are total (scalars that had a gradient); forget_norm and remember_norm (if the
        method needs that gradient); cosine (if it needs both); update_norm (of G before clipping);
        moved, the distance from theta0 before the step (if theta0 is held); and the method's own.
        Those of EBU are in docs/method.md.
        """
        return {} if self._last is None else self.rule.read(self._last)


def _is_zero(lr: Any) -> bool:
    return float(lr) == 0
