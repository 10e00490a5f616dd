"""The parameters of an optimizer with their places, and their identity when groups change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ._shards import any_sharded, local

Key = int  # identifies one tensor, wherever it is in the groups
Group = dict[str, Any]
T = TypeVar("T")


class Slot(NamedTuple):
    """A parameter and its place in the optimizer.

    Attributes:
        key: the key of the parameter's own state. It belongs to the tensor and moves with it when
            groups are deleted, filtered or reordered.
        group: the parameter group, which holds a rule's numbers as ``ebu_<name>``.
        param: the parameter; inside a step, this process's part of a sharded one.
        name: the name in messages.
        place: the present (group, position in the group).
    """

    key: Key
    group: Group
    param: Tensor
    name: str
    place: tuple[int, int]


class SlotList(list[Slot]):
    """A list of slots, and values that depend on all of them (read-only).

    Attributes:
        keys, params: by slot.
        groups: the groups that contain the slots.
        group_of: by slot, the index of its group in `groups`.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        super().__init__(slots)
        self.keys = [s.key for s in self]
        self.params = [s.param for s in self]
        found = {s.place[0]: s.group for s in self}
        at = {place: i for i, place in enumerate(found)}
        self.groups, self.group_of = list(found.values()), [at[s.place[0]] for s in self]
        self._made: dict[str, tuple[Any, Any]] = {}

    def __reduce__(self) -> Any:
        return SlotList, (list(self),)

    @cached_property
    def key_set(self) -> frozenset[Key]:
        return frozenset(self.keys)

    @cached_property
    def sharded(self) -> bool:
        """Whether a parameter is sharded."""
        return any_sharded(self.params)

    def local(self) -> SlotList:
        """Return the slots with this process's parts of the parameters."""
        if not self.sharded:
            return self
        return SlotList(s._replace(param=local(s.param)) for s in self)

    def made(self, name: str, of: Any, make: Callable[[], T]) -> T:
        """Return the cached result of `make`; call it again if `of` changed (compared by value)."""
        held = self._made.get(name)
        if held is None or held[0] != of:
            held = self._made[name] = of, make()
        return held[1]


class Slots:
    """Every parameter of the groups; a tied parameter occurs once.

    The slots are cached until a group or a parameter is replaced, because making them again at
    every call costs more than the step of a model of many small tensors.

    A tensor that has left the groups is remembered: if it comes back, it gets its former state.
    A new tensor takes over the key of the tensor that stood in its place and is gone, because
    `fully_shard` replaces parameters in this way. If both have names, the names must be equal.

    Args:
        base: the optimizer that has the ``param_groups``.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._seen: list[tuple[Group, list[Tensor]]] = []  # what `_known` was made of
        self._known = SlotList(())
        self._tensors: dict[Key, Tensor] = {}  # strong references, like those of the base's state
        self._layout: list[tuple[Group, list[tuple[Key, str | None]]]] = []  # at the last look
        self._next: Key = 0

    def __call__(self) -> SlotList:
        """Return the present slots (read-only)."""
        groups = self._base.param_groups
        if len(groups) != len(self._seen) or not all(map(_same, groups, self._seen)):
            self._known = self._look(groups)
            self._seen = [(group, list(group["params"])) for group in groups]
        return self._known

    def _look(self, groups: list[Group]) -> SlotList:
        keys = {id(p): key for key, p in self._tensors.items()}
        used = {keys[id(p)] for group in groups for p in group["params"] if id(p) in keys}
        slots: dict[Key, Slot] = {}
        layout, index = [], 0
        for g, group in enumerate(groups):
            held: list[tuple[Key, str | None]] = []
            former = self._former(g, groups)
            for i, (p, name) in enumerate(zip(group["params"], _names(group), strict=True)):
                if id(p) not in keys:
                    key, old = former[i] if former else (self._next, None)
                    if key in used or not (name is None or old is None or name == old):
                        key = self._next
                    self._next = max(self._next, key + 1)
                    keys[id(p)] = key
                    used.add(key)
                    self._tensors[key] = p
                key = keys[id(p)]
                held.append((key, name))
                shown = name or f"parameter {index} (group {g})"
                slots.setdefault(key, Slot(key, group, p, shown, (g, i)))
                index += 1
            layout.append((group, held))
        self._layout = layout
        return SlotList(slots.values())

    def _former(self, g: int, groups: list[Group]) -> list[tuple[Key, str | None]]:
        """Return the g-th group as at the last call; [] if its places have changed."""
        found = next((held for old, held in self._layout if old is groups[g]), None)
        if found is None and g < len(self._layout):
            old, held = self._layout[g]
            found = None if any(old is group for group in groups) else held
        return found if found and len(found) == len(groups[g]["params"]) else []


def _same(group: Group, seen: tuple[Group, list[Tensor]]) -> bool:
    now, (before, params) = group["params"], seen
    return group is before and len(now) == len(params) and all(map(is_, now, params))


def _names(group: Group) -> list[str | None]:
    names = group.get("param_names") or []
    n = len(group["params"])
    return list(names) if len(names) == n else [None] * n
