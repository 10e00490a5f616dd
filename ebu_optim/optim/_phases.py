"""Which gradient belongs to which loss: the phases of a step, and who owns a buffer when.

Entering a phase puts its gradients onto the parameters; leaving it takes them off. Between the
phases, GradScaler and gradient hooks expect a gradient on the parameters. So the gradients of the
*shown* phase, the last one that the rule needs, stay there. Buffers change owner. A gradient is
copied only if its memory is shared, as in DDP's buckets, or would be overwritten.

================== ============================== ======================= =========================
when               ``param.grad`` holds           kept here               a write to ``param.grad``
================== ============================== ======================= =========================
before a phase     nothing, or G of the last step nothing                 raises, except for zeros
in ``forget()``    g_f of the micro-batches       g_r, if it was made     is the forget loss's
in ``remember()``  g_r of the micro-batches       g_f, if it was made     is the remember loss's
between them       the shown gradient (g_r; g_f   the other one           raises, except for the
                   if the rule needs only g_f)                            scaler's probe
in ``step()``      G in the buffer of a spent     nothing                 is the rule's
                   gradient
after ``step()``   G, until the next phase        nothing                 is allowed: G is spent
================== ============================== ======================= =========================

A phase that the rule does not need runs too, and its gradients are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import kernels
from . import _checks
from ._anchors import Anchors
from ._gradients import (
    Gradients,
    Grads,
    any_of,
    on,
    owning,
    put,
    separate,
    writable,
)
from ._shards import local
from ._slots import SlotList


class Phases:
    """The gradients of the step that is being made.

    Args:
        slots: returns the optimizer's parameters as they are now.
        anchors: takes theta0 and F of the parameters at a step's first phase, and of further
            parameters that a later phase trains.
        needs: which phases must have run before a step: "forget", "remember" or both.
    """

    def __init__(
        self,
        slots: Callable[[], SlotList],
        anchors: Anchors,
        needs: Sequence[str] = ("forget", "remember"),
    ) -> None:
        self._slots = slots
        self._anchors = anchors
        self.needs = tuple(needs)
        self.shown = self.needs[-1]
        # before the first step, and if the last step came through GradScaler: add the probe
        self.probes = True
        # G of the last step is still on the parameters; the next phase discards it
        self.update = Gradients()
        self.reset()

    def reset(self) -> None:
        self.active: str | None = None
        self.done: frozenset[str] = frozenset()
        #: By phase. Those of the shown phase are also on the parameters.
        self._grads = {name: Gradients() for name in ("forget", "remember")}
        self._poison: tuple[Tensor, Tensor] | None = None

    def of(self, name: str) -> Grads:
        """Return the gradients of a phase, in the order of the slots at the last `look`."""
        return self._grads[name].tensors

    def look(self) -> SlotList:
        """Return the current slots, and reorder the gradients by them."""
        slots = self._slots()
        for kept in self._grads.values():
            kept.follow(slots)
        return slots

    @property
    def complete(self) -> bool:
        """Whether every phase that a step needs has run."""
        return self.done.issuperset(self.needs)

    def close(self) -> None:
        """End a step: the gradients that are now on the parameters are spent."""
        slots = self._slots()
        self.update = Gradients(slots, on(slots.params))
        self.reset()

    def release(self) -> None:
        """Drop G of the last step, which the parameters no longer hold, to free its memory."""
        self.update = Gradients()

    def discard(self) -> None:
        """Drop the step that is being made, and its gradients."""
        for param in self._slots().params:
            param.grad = None
        self.reset()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.active is not None:
            raise RuntimeError(f"{name}() inside {self.active}(): phases cannot be nested")
        if name not in self.needs:
            aside = self._set_aside(name)
            try:
                yield
            finally:
                self._put_back(aside)
            return
        self._enter(name)
        try:
            yield
        finally:
            self._leave(name)

    @_disable_dynamo
    def _set_aside(self, name: str) -> tuple[list[Tensor], Grads]:
        """Begin a phase that the step does not need; return the parameters and their gradients."""
        slots = self._begin(name)
        shown = self._grads[self.shown]
        now = shown.tensors
        shown.own()
        put(slots.params, now, [None] * len(slots))
        self.active = name
        return slots.params, shown.tensors

    @_disable_dynamo
    def _put_back(self, aside: tuple[list[Tensor], Grads]) -> None:
        self.active = None
        params, grads = aside
        put(params, on(params), grads)

    def _begin(self, name: str) -> SlotList:
        """Begin any phase.

        At a step's first phase, only G of the last step may be on the parameters. At a later
        phase, only the shown gradient may be there.
        """
        slots = self.look()
        if self.done:
            self._anchors.hold(slots)
            self.check_untouched(slots)
            return slots
        _checks.all_sharded(slots)  # fully_shard may have replaced parameters since the last step
        now = on(slots.params)
        if any_of(now):
            self.update.follow(slots)
            for i in self.update.others(now):
                _checks.foreign_gradient(slots[i], name)
        self._anchors.take(slots)
        self.update = Gradients()
        put(slots.params, now, [None] * len(slots))
        return slots

    @_disable_dynamo
    def _enter(self, name: str) -> None:
        slots = self._begin(name)
        self.unpoison()
        if name != self.shown:
            own, shown = self._grads[name], self._grads[self.shown]
            put(slots.params, shown.tensors, own.tensors)
            own.hold([None] * len(slots))
            # before another backward pass overwrites the buckets that these gradients lie in
            shown.own()
        self.active = name

    @_disable_dynamo
    def _leave(self, name: str) -> None:
        self.active = None
        self.done |= {name}
        slots = self.look()
        now = on(slots.params)
        try:
            at = _checks.gradients(slots, now)
            _checks.kept_back(slots, now, name)
            self._check_kept(slots, at, name)
        except (TypeError, RuntimeError):
            self.discard()
            raise
        own = separate(writable(now) if name == self.shown else owning(now), at)
        self._grads[name].hold(own, at if own is now else None)
        put(slots.params, now, self._grads[self.shown].tensors)
        if self.complete:
            self._carry_nonfinite()

    @torch.no_grad()
    def _carry_nonfinite(self) -> None:
        """Let GradScaler see a non-finite gradient that is not shown.

        Before `step`, GradScaler looks at param.grad only. So a probe, which is NaN if the other
        gradient is not finite, is added to one element of param.grad on the device. It is removed
        before that gradient is used. If the last step came without a scaler, no probe is added; if
        a scaler is used after all, `step` checks both gradients itself.
        """
        if not self.probes:
            return
        others = [g for n in self.needs if n != self.shown for g in self._grads[n].tensors]
        hidden = [local(g) for g in others if g is not None]
        if not hidden:
            return
        probe = kernels.backend(hidden, None).finite_probe(hidden)
        shown = self._grads[self.shown]
        parts = (local(g) for g in shown.tensors if g is not None)
        grad = next((g for g in parts if g.numel()), None)
        if probe is None or grad is None:
            return
        element = grad.as_strided((), ())
        self._poison = (element, element.clone())
        element += probe.to(element.device, element.dtype)
        shown.hold(shown.tensors)

    def unpoison(self) -> None:
        if self._poison is not None:
            element, saved = self._poison
            with torch.no_grad():
                element.copy_(saved)
            self._poison = None
            shown = self._grads[self.shown]
            shown.hold(shown.tensors)

    def _check_kept(self, slots: SlotList, at: list[int], name: str) -> None:
        """Raise RuntimeError if a phase wrote the gradients of the other phase.

        This happens if a user sets ``param.grad`` to the same tensor in both phases.
        """
        for other in self.needs:
            i = None if other == name else self._grads[other].written(at)
            if i is not None:
                raise RuntimeError(
                    f"the {other} gradient of {slots[i].name} was written inside {name}(), or both "
                    "phases use the same tensor, which cannot hold both gradients; give "
                    "each phase its own tensor, such as param.grad = buffer.clone()"
                )

    def check_untouched(self, slots: SlotList) -> None:
        """Raise RuntimeError if a gradient was changed between the phases and the step."""
        i = self._grads[self.shown].touched(on(slots.params))
        if i is None:
            return
        self.discard()
        raise RuntimeError(
            f"the gradient of {slots[i].name} was changed outside the phases. Clipping, unscaling, "
            "zero_grad or a backward pass there changes only one of the two gradients; clip "
            "with EBUOptimizer(max_grad_norm=...), leave unscaling to scaler.step(), and run "
            "every backward pass inside forget() or remember()"
        )

    def require_all(self) -> None:
        """Raise RuntimeError unless every needed phase has run and made a gradient."""
        if self.active is not None:
            raise RuntimeError(f"step inside {self.active}(); leave the phase first")
        for name in self.needs:
            if name in self.done and any_of(self.of(name)):
                continue
            what = "made no gradient" if name in self.done else "is missing"
            ran = ", ".join(sorted(self.done)) or "none"
            if self.done:
                self.discard()
            where = " and one inside ".join(f"{n}()" for n in self.needs)
            raise RuntimeError(
                f"the {name} phase {what} (phases run: {ran}); a step needs a backward pass inside "
                f"{where}, or closures that call backward() on a loss of these parameters"
            )
