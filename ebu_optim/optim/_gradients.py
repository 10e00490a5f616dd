"""The gradients of one phase, in the order of the slots, and whether other code has written them.

Every step runs these checks on every tensor. They make passes over lists that call no Python
function per tensor: such calls would cost more than the step of a model of many small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not

import torch
from torch import Tensor

from ._shards import any_sharded, is_sharded
from ._slots import Key, SlotList

Grads = list[Tensor | None]  # by slot; None where there is no gradient

_GRAD, _NBYTES = attrgetter("grad"), attrgetter("nbytes")
_PLACED = (0).__lt__  # of an address: whether it is that of a non-empty plain tensor


def on(params: Sequence[Tensor]) -> Grads:
    """Return the gradients that are on the parameters."""
    return list(map(_GRAD, params))


def any_of(grads: Sequence[Tensor | None]) -> bool:
    """Whether there is a gradient."""
    return any(map(is_not, grads, repeat(None)))


def put(
    params: Sequence[Tensor], now: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> None:
    """Set `grads` as the gradients of the parameters; `now` are the present ones."""
    if len(params) == len(now) == len(grads) and all(map(is_, now, grads)):
        return
    for p, old, grad in zip(params, now, grads, strict=True):
        if grad is not old:
            p.grad = grad


def with_gradients(slots: SlotList, g_f: Grads, g_r: Grads) -> tuple[SlotList, Grads, Grads]:
    """Return the slots that have at least one of the two gradients, and their gradients."""
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
        slots: the parameters that they belong to.
        tensors: the gradients by slot.

    Attributes:
        tensors: the gradients by slot.
    """

    def __init__(self, slots: SlotList | None = None, tensors: Grads | None = None) -> None:
        self._slots = SlotList(()) if slots is None else slots
        # gradients of parameters that are in no group now
        self._left: dict[Key, tuple[Tensor | None, int | None]] = {}
        self.hold(tensors or [])

    def hold(self, tensors: Grads, at: list[int] | None = None) -> None:
        """Hold these gradients with their versions; `at` are their `addresses` if known."""
        self.tensors, self._versions, self._at = tensors, _versions(tensors), at

    def follow(self, slots: SlotList) -> None:
        """Reorder the gradients by these slots; each gradient stays with its parameter."""
        if slots is self._slots:
            return
        marked = zip(self.tensors, self._versions, strict=True)
        found = self._left | dict(zip((s.key for s in self._slots), marked, strict=True))
        self._slots = slots
        if found:
            pairs = [found.pop(key, (None, None)) for key in slots.keys]
            self.tensors, self._versions = [t for t, _ in pairs], [v for _, v in pairs]
            self._left, self._at = found, None
        else:
            self.hold([None] * len(slots))

    def others(self, now: Grads) -> list[int]:
        """Return the slots where a gradient of `now` is another tensor or was written since."""
        versions = _versions(now)
        if versions == self._versions and all(map(is_, now, self.tensors)):
            return []
        rows = zip(now, self.tensors, versions, self._versions, strict=True)
        return [
            i
            for i, (new, kept, v, was) in enumerate(rows)
            if new is not None and (new is not kept or v != was)
        ]

    def touched(self, now: Grads) -> int | None:
        """Return the first slot whose gradient is another tensor or was written; None if none is.

        Args:
            now: the gradients that are on the parameters.
        """
        versions = _versions(now)
        if all(map(is_, now, self.tensors)) and versions == self._versions:
            return None
        rows = zip(now, self.tensors, versions, self._versions, strict=True)
        return next(i for i, (new, kept, v, was) in enumerate(rows) if new is not kept or v != was)

    def written(self, new_at: list[int]) -> int | None:
        """Return the first slot whose gradient was written or shares memory with a new gradient.

        Args:
            new_at: the `addresses` of the new gradients.

        Returns:
            None if there is no such slot.
        """
        if not any_of(self.tensors):
            return None
        versions = _versions(self.tensors)
        at = addresses(self._slots, self.tensors) if self._at is None else self._at
        if versions == self._versions and set(at).isdisjoint(new_at):
            return None
        taken = set(filter(_PLACED, new_at))
        rows = zip(at, versions, self._versions, strict=True)
        return next((i for i, (a, v, was) in enumerate(rows) if v != was or a in taken), None)

    def own(self) -> None:
        """Copy the gradients that the next backward pass would overwrite."""
        owned = owning(self.tensors)
        if owned is not self.tensors:
            self.hold(owned)


def writable(grads: Grads) -> Grads:
    """Copy gradients in which several elements share memory (expanded tensors).

    A step writes into its gradients, so each element needs its own memory. Returns the same list
    if there is no such gradient.
    """
    there = [g for g in grads if g is not None]
    if all(map(Tensor.is_contiguous, there)) or not any(map(_overlaps, there)):
        return grads
    return [g.clone() if g is not None and _overlaps(g) else g for g in grads]


def _overlaps(grad: Tensor) -> bool:
    return any(st == 0 for st, s in zip(grad.stride(), grad.shape, strict=True) if s > 1)


def separate(grads: Grads, at: list[int]) -> Grads:
    """Copy gradients that begin at the address of an earlier one.

    `torch.autograd.grad` returns such gradients for the terms of a sum. A step writes into each
    gradient, so they must not share memory. Returns the same list if there is no such gradient.

    Args:
        at: the `addresses` of the gradients.
    """
    if len(set(at)) == len(at):
        return grads
    there = list(filter(_PLACED, at))
    if len(set(there)) == len(there):
        return grads
    seen: set[int] = set()
    found: Grads = []
    for grad, address in zip(grads, at, strict=True):
        found.append(grad.clone() if grad is not None and 0 < address in seen else grad)
        seen.add(address if address > 0 else -1)
    return found


def owning(grads: Grads) -> Grads:
    """Copy gradients that are part of a larger buffer that will be overwritten (DDP's bucket).

    Returns the same list if there is no such gradient.
    """
    there = [g for g in grads if g is not None]
    if any_sharded(there):  # FSDP2 reduces into a new buffer at every backward pass
        there = [g for g in there if not is_sharded(g)]
    storages = map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, there))
    # a view may fill its buffer exactly: then the bucket has one parameter
    if not any(map(Tensor._is_view, there)) and list(storages) == list(map(_NBYTES, there)):
        return grads
    return [g.clone() if g is not None and _shares_storage(g) else g for g in grads]


def _shares_storage(grad: Tensor) -> bool:
    if is_sharded(grad):
        return False
    return grad._is_view() or grad.untyped_storage().nbytes() != grad.nbytes


def _versions(grads: Grads) -> list[int | None]:
    return [None if g is None else g._version for g in grads]


def addresses(slots: SlotList, grads: Grads) -> list[int]:
    """Return the addresses of plain tensors; 0 for empty ones, -1 for sharded or missing ones."""
    if slots.sharded:
        return [-1 if g is None or is_sharded(g) else g.data_ptr() for g in grads]
    return [-1 if g is None else g.data_ptr() for g in grads]
