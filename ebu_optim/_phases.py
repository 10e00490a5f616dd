"""Which gradient belongs to which loss: the two phases of a step, and who owns a buffer when.

Outside a phase the remember gradient lies on the parameters, where GradScaler and gradient hooks
expect one, and the forget gradient is kept here. Nothing is copied: buffers change owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import _checks, kernels
from ._shards import is_sharded, local

Key = tuple[int, int]  # (group, position in the group): survives replaced tensors


class Slot(NamedTuple):
    """A parameter and its place in the optimizer."""

    key: Key
    group: dict[str, Any]
    param: Tensor
    name: str


class Phases:
    """The gradients of the step under way.

    Args:
        slots: returns the optimizer's parameters as they are now.
        first: called with them when a step's first phase begins.
        needs: the phases that a step needs. Of one alone the gradient lies on the parameters, as
            the remember gradient of two does; what the other makes is dropped.
    """

    def __init__(
        self,
        slots: Callable[[], Iterable[Slot]],
        first: Callable[[Sequence[Slot]], None],
        needs: Sequence[str] = ("forget", "remember"),
    ) -> None:
        self._slots = slots
        self._first = first
        self.needs = tuple(needs)
        self._moved = "forget" if len(self.needs) == 2 else None
        # G of the last step and its version, still on the parameters: the next phase discards it
        self.update: dict[Key, tuple[Tensor, int]] = {}
        self.reset()

    def reset(self) -> None:
        self.active: str | None = None
        self.done: frozenset[str] = frozenset()
        self.forget: dict[Key, Tensor] = {}
        self.remember: dict[Key, tuple[Tensor, int]] = {}  # gradient and its version
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
        slots = list(self._slots())
        self._begin(slots, name)
        self.check_untouched(slots)
        self._own_remembered()
        aside = [(s.param, self.remember.get(s.key, (None, 0))[0]) for s in slots]
        for param, _ in aside:
            param.grad = None
        self.active = name
        return aside

    @_disable_dynamo
    def _put_back(self, aside: list[tuple[Tensor, Tensor | None]]) -> None:
        self.active = None
        for param, grad in aside:
            param.grad = grad

    def _own_remembered(self) -> None:
        """Before another backward pass fills the buckets that gradients lie in."""
        for key, (grad, _) in self.remember.items():
            if _shares_storage(grad):
                grad = grad.clone()
                self.remember[key] = (grad, grad._version)

    def _begin(self, slots: Sequence[Slot], name: str) -> None:
        """At a step's first phase: nothing but the G of the last step may lie on the parameters."""
        if self.done:
            return
        for slot in slots:
            _checks.sharded(slot.param, slot.name)  # replaced since the optimizer was built?
            grad = slot.param.grad
            if grad is None:
                continue
            spent, version = self.update.get(slot.key, (None, 0))
            if grad is not spent or grad._version != version:
                _checks.foreign_gradient(slot, name)
        self._first(slots)
        self.update = {}
        for slot in slots:
            slot.param.grad = None

    @_disable_dynamo
    def _enter(self, name: str) -> None:
        slots = list(self._slots())
        self._begin(slots, name)
        self.check_untouched(slots)
        self.unpoison()
        if name == self._moved:
            for slot in slots:
                slot.param.grad = self.forget.pop(slot.key, None)
            self._own_remembered()
        self.active = name

    @_disable_dynamo
    def _leave(self, name: str) -> None:
        self.active = None
        self.done |= {name}
        slots = list(self._slots())
        try:
            for slot in slots:
                _checks.gradient(slot)
            _checks.kept_back(slots, name)
        except (TypeError, RuntimeError):
            self.discard()
            raise
        if name == self._moved:
            for slot in slots:
                grad = slot.param.grad
                if grad is not None:
                    self.forget[slot.key] = grad.clone() if _shares_storage(grad) else grad
                slot.param.grad = self.remember.get(slot.key, (None, 0))[0]
        self.remember = {
            s.key: (s.param.grad, s.param.grad._version) for s in slots if s.param.grad is not None
        }
        if self.complete:
            self._carry_nonfinite()

    @torch.no_grad()
    def _carry_nonfinite(self) -> None:
        """Let GradScaler see a non-finite forget gradient.

        Before `step` it looks into param.grad alone, where g_f no longer is. A probe that is NaN
        where g_f is not finite is added to one element of param.grad on the device, and taken back
        before that gradient is used.
        """
        forget = [local(g) for g in self.forget.values()]
        probe = kernels.backend(forget, None).finite_probe(forget)
        parts = (local(g) for g, _ in self.remember.values())
        grad = next((g for g in parts if g.numel()), None)
        if probe is None or grad is None:
            return
        element = grad.as_strided((), ())
        self._poison = (element, element.clone())
        element += probe.to(element.device, element.dtype)
        self._remark()

    def unpoison(self) -> None:
        if self._poison is not None:
            element, saved = self._poison
            with torch.no_grad():
                element.copy_(saved)
            self._poison = None
            self._remark()

    def _remark(self) -> None:
        self.remember = {k: (g, g._version) for k, (g, _) in self.remember.items()}

    def check_untouched(self, slots: Iterable[Slot]) -> None:
        """Between the phases and step nobody may clip, unscale, clear or add to the gradients."""
        for slot in slots:
            grad, version = self.remember.get(slot.key, (None, 0))
            if slot.param.grad is grad and (grad is None or grad._version == version):
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
            moved = name == self._moved
            if name in self.done and any(
                s.key in self.forget if moved else s.param.grad is not None for s in slots
            ):
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


def _shares_storage(grad: Tensor) -> bool:
    """Part of a larger buffer, such as DDP's bucket, which will be overwritten."""
    if is_sharded(grad):  # FSDP2 reduces into a new buffer at every backward pass
        return False
    # a view may fill its buffer exactly: a bucket of one parameter
    whole = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    return grad._is_view() or not whole
