"""The parameters of an optimizer, their places in it, and which of them were there before."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ._shards import any_sharded, local

Key = int  # of one tensor, wherever it stands in the groups
Group = dict[str, Any]
T = TypeVar("T")


class Slot(NamedTuple):
    """A parameter and its place in the optimizer.

    Attributes:
        key: what a state of its own is kept by. It belongs to the tensor and moves with it when
            groups are deleted, filtered or reordered.
        group: the parameter group, which holds a rule's numbers as ``ebu_<name>``.
        param: the parameter; inside a step this process's part of a sharded one.
        name: for messages.
        place: (group, position in the group) as they are now.
    """

    key: Key
    group: Group
    param: Tensor
    name: str
    place: tuple[int, int]


class SlotList(list[Slot]):
    """Slots, and what belongs to all of them as long as they are the same (do not write).

    Attributes:
        keys, params: by slot.
        groups: those that the slots are in.
        group_of: by slot, the place of its group in `groups`.
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
        """Some parameter is a part of a larger one."""
        return any_sharded(self.params)

    def local(self) -> SlotList:
        """With this process's parts of the parameters."""
        if not self.sharded:
            return self
        return SlotList(s._replace(param=local(s.param)) for s in self)

    def made(self, name: str, of: Any, make: Callable[[], T]) -> T:
        """What `make` makes of these slots and `of`, made anew where `of` is another: anything
        that is compared by its value."""
        held = self._made.get(name)
        if held is None or held[0] != of:
            held = self._made[name] = of, make()
        return held[1]


class Slots:
    """Every parameter of the groups, a tied one once.

    They are kept until a group or a parameter is another: making them anew at every look costs more
    than the step of a model of many small tensors.

    A tensor that left the groups is remembered: where it comes back, its state is its own. One
    that was never seen takes over the key of the tensor that stood in its place and is gone
    (`fully_shard` replaces parameters so), if it has the same name as far as both have names.

    Args:
        base: whose ``param_groups`` are looked at.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._seen: list[Any] = []  # groups and parameters when `_known` was made
        self._known = SlotList(())
        self._tensors: dict[Key, Tensor] = {}  # strong, as the base's own state holds them
        self._layout: list[tuple[Group, list[tuple[Key, str | None]]]] = []  # at the last look
        self._next: Key = 0

    def __call__(self) -> SlotList:
        """As they are now (do not write)."""
        groups = self._base.param_groups
        now = [x for group in groups for x in (group, *group["params"])]
        if len(now) != len(self._seen) or any(map(operator.is_not, now, self._seen)):
            self._seen, self._known = now, self._look(groups)
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
        """What stood in the g-th group at the last look; [] where its places are others now."""
        found = next((held for old, held in self._layout if old is groups[g]), None)
        if found is None and g < len(self._layout):
            old, held = self._layout[g]
            found = None if any(old is group for group in groups) else held
        return found if found and len(found) == len(groups[g]["params"]) else []


def _names(group: Group) -> list[str | None]:
    names = group.get("param_names") or []
    n = len(group["params"])
    return list(names) if len(names) == n else [None] * n
