"""How messages name the arguments of the metrics: by their own names, or by a command's options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_NAMES: ContextVar[Mapping[str, str]] = ContextVar("names", default={})  # noqa: B039


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Make errors and reasons in the block name arguments as the caller's user knows them, as in
    ``called(weights_file="--resnet_weights")``."""
    token = _NAMES.set({**_NAMES.get(), **names})
    try:
        yield
    finally:
        _NAMES.reset(token)


def name_of(argument: str) -> str:
    """Return the name of an argument in messages."""
    return _NAMES.get().get(argument, argument)
