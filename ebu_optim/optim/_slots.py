"""The parameters of an optimizer and their places in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

Key = tuple[int, int]  # (group, position in the group): survives replaced tensors


class Slot(NamedTuple):
    """A parameter and its place in the optimizer.

    Attributes:
        key: (group, position in the group).
        group: the parameter group, which holds a rule's numbers as ``ebu_<name>``.
        param: the parameter; inside a step this process's part of a sharded one.
        name: for messages.
    """

    key: Key
    group: dict[str, Any]
    param: Tensor
    name: str


class Slots:
    """Every parameter of the groups, a tied one once.

    They are kept until a group or a parameter is another: making them anew at every look costs more
    than the step of a model of many small tensors.

    Args:
        groups: returns the parameter groups as they are now.
    """

    def __init__(self, groups: Callable[[], list[dict[str, Any]]]) -> None:
        self._groups = groups
        self._seen: list[Any] = []  # groups and parameters when `_known` was made
        self._known: list[Slot] = []

    def __call__(self) -> list[Slot]:
        """As they are now (do not write)."""
        groups = self._groups()
        now = [x for group in groups for x in (group, *group["params"])]
        if len(now) != len(self._seen) or any(map(operator.is_not, now, self._seen)):
            self._seen, self._known = now, list(_find(groups))
        return self._known


def _find(groups: list[dict[str, Any]]) -> Iterator[Slot]:
    seen: set[int] = set()
    index = 0
    for g, group in enumerate(groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            if id(p) not in seen:
                seen.add(id(p))
                yield Slot(
                    (g, i), group, p, names[i] if names else f"parameter {index} (group {g})"
                )
            index += 1
