"""Which gradient belongs to which loss: the phases of a step, and who owns a buffer when.

A phase puts its gradients onto the parameters when it is entered and takes them off when it is
left. Between the phases one of them lies on the parameters all the same, where GradScaler and
gradient hooks expect one: that of the phase which is *shown*, the last that the rule needs. Nothing
is copied: buffers change owner.

================== ============================== ======================= =========================
when               ``param.grad`` holds           kept here               whoever writes param.grad
================== ============================== ======================= =========================
before a phase     nothing, or G of the last step nothing                 raises, but for zeros
in ``forget()``    g_f of the micro-batches       g_r, where it ran       is the forget loss
in ``remember()``  g_r of the micro-batches       g_f, where it ran       is the remember loss
between them       the shown gradient (g_r; g_f   the other one           raises; the scaler's probe
                   where the rule needs it alone)                         alone is added
in ``step()``      G in the buffer of a spent     nothing                 is the rule
                   gradient
after ``step()``   G, until the next phase        nothing                 may: G is spent
================== ============================== ======================= =========================

A phase that the rule does not need runs all the same, and what it makes is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import kernels
from . import _checks
from ._anchors import Anchors
from ._shards import is_sharded, local
from ._slots import Key, Slot


class Phases:
    """The gradients of the step under way.

    Args:
        slots: returns the optimizer's parameters as they are now.
        anchors: what takes theta0 and F of them, at a step's first phase and where another phase
            trains more.
        needs: the phases that a step needs, of "forget" and "remember".
    """

    def __init__(
        self,
        slots: Callable[[], Sequence[Slot]],
        anchors: Anchors,
        needs: Sequence[str] = ("forget", "remember"),
    ) -> None:
        self._slots = slots
        self._anchors = anchors
        self.needs = tuple(needs)
        self.shown = self.needs[-1]
        # G of the last step and its version, still on the parameters: the next phase discards it
        self.update: dict[Key, tuple[Tensor, int]] = {}
        self.reset()

    def reset(self) -> None:
        self.active: str | None = None
        self.done: frozenset[str] = frozenset()
        #: By phase and key. Those of the shown phase lie on the parameters too.
        self.grads: dict[str, dict[Key, Tensor]] = {name: {} for name in ("forget", "remember")}
        self._versions: dict[str, dict[Key, int]] = {name: {} for name in self.grads}
        self._poison: tuple[Tensor, Tensor] | None = None

    @property
    def complete(self) -> bool:
        """Every phase that a step needs has run."""
        return self.done.issuperset(self.needs)

    def close(self, slots: Iterable[Slot]) -> None:
        """After a step: what lies on the parameters now is spent."""
        grads = {s.key: s.param.grad for s in slots}
        self.update = {k: (g, g._version) for k, g in grads.items() if g is not None}
        self.reset()

    def discard(self) -> None:
        """Drop the step under way, gradients included."""
        for slot in self._slots():
            slot.param.grad = None
        self.reset()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.active is not None:
            raise RuntimeError(f"{name}() inside {self.active}(): phases do not nest")
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
    def _set_aside(self, name: str) -> list[tuple[Tensor, Tensor | None]]:
        """Before a phase that the step does not need: the parameters and their gradients."""
        slots = self._slots()
        self._begin(slots, name)
        self.check_untouched(slots)
        self._own_shown()
        shown = self.grads[self.shown]
        aside = [(s.param, shown.get(s.key)) for s in slots]
        for param, _ in aside:
            param.grad = None
        self.active = name
        return aside

    @_disable_dynamo
    def _put_back(self, aside: list[tuple[Tensor, Tensor | None]]) -> None:
        self.active = None
        for param, grad in aside:
            param.grad = grad

    def _own_shown(self) -> None:
        """Before another backward pass fills the buckets that gradients lie in."""
        shown = self.grads[self.shown]
        for key, grad in shown.items():
            if _shares_storage(grad):
                shown[key] = grad = grad.clone()
                self._versions[self.shown][key] = grad._version

    def _begin(self, slots: Sequence[Slot], name: str) -> None:
        """At a step's first phase: nothing but the G of the last step may lie on the parameters."""
        if self.done:
            self._anchors.hold(slots)
            return
        for slot in slots:
            _checks.sharded(slot.param, slot.name)  # replaced since the optimizer was built?
            grad = slot.param.grad
            if grad is None:
                continue
            spent, version = self.update.get(slot.key, (None, 0))
            if grad is not spent or grad._version != version:
                _checks.foreign_gradient(slot, name)
        self._anchors.take(slots)
        self.update = {}
        for slot in slots:
            slot.param.grad = None

    @_disable_dynamo
    def _enter(self, name: str) -> None:
        slots = self._slots()
        self._begin(slots, name)
        self.check_untouched(slots)
        self.unpoison()
        if name != self.shown:
            own = self.grads[name]
            for slot in slots:
                slot.param.grad = own.pop(slot.key, None)
            self._own_shown()
        self.active = name

    @_disable_dynamo
    def _leave(self, name: str) -> None:
        self.active = None
        self.done |= {name}
        slots = self._slots()
        try:
            for slot in slots:
                _checks.gradient(slot)
            _checks.kept_back(slots, name)
            self._check_kept(slots, name)
        except (TypeError, RuntimeError):
            self.discard()
            raise
        if name != self.shown:
            own, shown = self.grads[name], self.grads[self.shown]
            for slot in slots:
                grad = slot.param.grad
                if grad is not None:
                    own[slot.key] = grad.clone() if _shares_storage(grad) else grad
                slot.param.grad = shown.get(slot.key)
            self._remark(name)
        self.grads[self.shown] = {s.key: grad for s in slots if (grad := s.param.grad) is not None}
        self._remark(self.shown)
        if self.complete:
            self._carry_nonfinite()

    @torch.no_grad()
    def _carry_nonfinite(self) -> None:
        """Let GradScaler see a non-finite gradient that is not shown.

        Before `step` it looks into param.grad alone. A probe that is NaN where the other gradient
        is not finite is added to one element of param.grad on the device, and taken back before
        that gradient is used.
        """
        others = [g for n in self.needs if n != self.shown for g in self.grads[n].values()]
        if not others:
            return
        hidden = [local(g) for g in others]
        probe = kernels.backend(hidden, None).finite_probe(hidden)
        parts = (local(g) for g in self.grads[self.shown].values())
        grad = next((g for g in parts if g.numel()), None)
        if probe is None or grad is None:
            return
        element = grad.as_strided((), ())
        self._poison = (element, element.clone())
        element += probe.to(element.device, element.dtype)
        self._remark(self.shown)

    def unpoison(self) -> None:
        if self._poison is not None:
            element, saved = self._poison
            with torch.no_grad():
                element.copy_(saved)
            self._poison = None
            self._remark(self.shown)

    def _remark(self, name: str) -> None:
        self._versions[name] = {k: g._version for k, g in self.grads[name].items()}

    def _check_kept(self, slots: Iterable[Slot], name: str) -> None:
        """At the end of a phase: it has not written the other's gradients, as a user does who gives
        ``param.grad`` one tensor of his own in both."""
        for other in self.needs:
            kept, versions = self.grads[other], self._versions[other]
            if other == name or not kept:
                continue
            for slot in slots:
                grad = kept.get(slot.key)
                if grad is None:
                    continue
                if grad._version != versions[slot.key] or _same_memory(grad, slot.param.grad):
                    raise RuntimeError(
                        f"the {other} gradient of {slot.name} was written inside {name}(), or is "
                        "the tensor that this phase gave too: one tensor cannot hold both. Give "
                        "each phase its own, such as param.grad = buffer.clone()"
                    )

    def check_untouched(self, slots: Iterable[Slot]) -> None:
        """Between the phases and step nobody may clip, unscale, clear or add to the gradients."""
        shown, versions = self.grads[self.shown], self._versions[self.shown]
        for slot in slots:
            grad = shown.get(slot.key)
            same = slot.param.grad is grad
            if same and (grad is None or grad._version == versions[slot.key]):
                continue
            self.discard()
            raise RuntimeError(
                f"the gradient of {slot.name} was changed outside the phases: clipping, unscaling, "
                "zero_grad or a backward pass there touches one of the two gradients only. Clip "
                "with EBUOptimizer(max_grad_norm=...), leave unscaling to scaler.step(), and run "
                "every backward pass inside forget() or remember()"
            )

    def require_all(self, slots: Sequence[Slot]) -> None:
        """Raise unless every phase that is needed ran and made a gradient."""
        if self.active is not None:
            raise RuntimeError(f"step inside {self.active}(): leave the phase first")
        for name in self.needs:
            if name in self.done and any(s.key in self.grads[name] for s in slots):
                continue
            what = "made no gradient" if name in self.done else "is missing"
            ran = ", ".join(sorted(self.done)) or "none"
            if self.done:
                self.discard()
            where = " and one inside ".join(f"{n}()" for n in self.needs)
            raise RuntimeError(
                f"the {name} phase {what} (phases run: {ran}): a step needs a backward pass inside "
                f"{where}, or closures that call backward() on a loss of these parameters"
            )


def _same_memory(kept: Tensor, new: Tensor | None) -> bool:
    if new is None or is_sharded(new):  # FSDP2 reduces into a new buffer at every backward pass
        return False
    return new.data_ptr() == kept.data_ptr() and bool(new.numel())


def _shares_storage(grad: Tensor) -> bool:
    """Part of a larger buffer, such as DDP's bucket, which will be overwritten."""
    if is_sharded(grad):  # FSDP2 reduces into a new buffer at every backward pass
        return False
    # a view may fill its buffer exactly: a bucket of one parameter
    whole = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    return grad._is_view() or not whole
