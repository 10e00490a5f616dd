"""The gradients of one phase, in the order of the slots, and whether somebody else wrote them.

What every step asks of every tensor is asked here in passes that call no function of ours for each
tensor: those would cost more than the step of a model of many small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, eq, is_, is_not

import torch
from torch import Tensor

from ._shards import any_sharded, is_sharded
from ._slots import Key, Slot, SlotList

Grads = list[Tensor | None]  # by slot, None where there is none

_GRAD, _NBYTES = attrgetter("grad"), attrgetter("nbytes")


def on(params: Sequence[Tensor]) -> Grads:
    """What lies on the parameters."""
    return list(map(_GRAD, params))


def any_of(grads: Sequence[Tensor | None]) -> bool:
    """There is a gradient."""
    return any(map(is_not, grads, repeat(None)))


def put(
    params: Sequence[Tensor], now: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> None:
    """Onto the parameters, where `now` lies."""
    for p, old, grad in zip(params, now, grads, strict=True):
        if grad is not old:
            p.grad = grad


def with_gradients(slots: SlotList, g_f: Grads, g_r: Grads) -> tuple[SlotList, Grads, Grads]:
    """The slots that have at least one of two gradients, and these."""
    if all(map(is_not, g_f, repeat(None))) or all(map(is_not, g_r, repeat(None))):
        return slots, g_f, g_r
    rows = [i for i, pair in enumerate(zip(g_f, g_r, strict=True)) if any_of(pair)]
    if len(rows) == len(slots):
        return slots, g_f, g_r
    some = slots.made("with gradients", rows, lambda: SlotList(slots[i] for i in rows))
    return some, [g_f[i] for i in rows], [g_r[i] for i in rows]


class Gradients:
    """The gradients of one phase.

    Args:
        slots: whose they are.
        tensors: by slot.

    Attributes:
        tensors: by slot.
    """

    def __init__(self, slots: Sequence[Slot] = (), tensors: Grads | None = None) -> None:
        self._slots = slots
        self._left: dict[Key, tuple[Tensor | None, int | None]] = {}  # of what is in no group now
        self.hold(tensors or [])

    def hold(self, tensors: Grads) -> None:
        """These from now on, as they are now."""
        self.tensors, self._versions = tensors, _versions(tensors)

    def follow(self, slots: SlotList) -> None:
        """By these slots from now on; each gradient stays with its parameter."""
        if slots is self._slots:
            return
        marked = zip(self.tensors, self._versions, strict=True)
        found = self._left | dict(zip((s.key for s in self._slots), marked, strict=True))
        self._slots = slots
        if found:
            pairs = [found.pop(key, (None, None)) for key in slots.keys]
            self.tensors, self._versions = [t for t, _ in pairs], [v for _, v in pairs]
            self._left = found
        else:
            self.hold([None] * len(slots))

    def others(self, now: Grads) -> list[int]:
        """The slots where a gradient of `now` is another tensor or was written since."""
        versions = _versions(now)
        if versions == self._versions and all(map(is_, now, self.tensors)):
            return []
        rows = zip(now, self.tensors, versions, self._versions, strict=True)
        return [
            i for i, (new, kept, v, was) in enumerate(rows)
            if new is not None and (new is not kept or v != was)
        ]  # fmt: skip

    def touched(self, now: Grads) -> int | None:
        """The first slot where `now`, what lies on the parameters, is another tensor or was
        written; None where none is."""
        versions = _versions(now)
        if all(map(is_, now, self.tensors)) and versions == self._versions:
            return None
        rows = zip(now, self.tensors, versions, self._versions, strict=True)
        return next(i for i, (new, kept, v, was) in enumerate(rows) if new is not kept or v != was)

    def written(self, new: Grads) -> int | None:
        """The first slot where the gradient was written, or lies in the memory of a `new` one;
        None where none does."""
        if not any_of(self.tensors):
            return None
        versions = _versions(self.tensors)
        kept_at, new_at = _addresses(self.tensors, 0), _addresses(new, -1)
        if versions == self._versions and not any(map(eq, kept_at, new_at)):
            return None
        rows = zip(self.tensors, versions, self._versions, kept_at, new_at, strict=True)
        return next(
            (
                i for i, (grad, v, was, a, b) in enumerate(rows)
                if v != was or (a == b and grad is not None and grad.numel())
            ), None,
        )  # fmt: skip

    def own(self) -> None:
        """Copy what the next backward pass would write again."""
        owned = owning(self.tensors)
        if owned is not self.tensors:
            self.hold(owned)


def writable(grads: Grads) -> Grads:
    """The gradients, copied where several elements are one place in memory (an expanded tensor), as
    a step writes into them; the same list where none is."""
    there = [g for g in grads if g is not None]
    if all(map(Tensor.is_contiguous, there)) or not any(map(_overlaps, there)):
        return grads
    return [g.clone() if g is not None and _overlaps(g) else g for g in grads]


def _overlaps(grad: Tensor) -> bool:
    return any(st == 0 for st, s in zip(grad.stride(), grad.shape, strict=True) if s > 1)


def owning(grads: Grads) -> Grads:
    """The gradients, copied where they are part of a larger buffer, such as DDP's bucket, which
    will be overwritten; the same list where none is."""
    # FSDP2 reduces into a new buffer at every backward pass
    there = [g for g in grads if g is not None and not hasattr(g, "placements")]
    storages = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, there))
    # a view may fill its buffer exactly: a bucket of one parameter
    if not any(map(Tensor._is_view, there)) and list(storages) == list(map(_NBYTES, there)):
        return grads
    return [g.clone() if g is not None and _shares_storage(g) else g for g in grads]


def _shares_storage(grad: Tensor) -> bool:
    if is_sharded(grad):
        return False
    return grad._is_view() or grad.untyped_storage().nbytes() != grad.nbytes


def _versions(grads: Grads) -> list[int | None]:
    return [None if g is None else g._version for g in grads]


def _addresses(grads: Grads, missing: int) -> list[int]:
    """Of plain tensors."""
    if any_sharded(grads):
        return [missing if g is None or is_sharded(g) else g.data_ptr() for g in grads]
    return [missing if g is None else g.data_ptr() for g in grads]
