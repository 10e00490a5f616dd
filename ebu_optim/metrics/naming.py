"""What messages call the arguments of the metrics: their own names, or those of a command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

_NAMES: ContextVar[Mapping[str, str]] = ContextVar("names", default={})  # noqa: B039


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Inside the block errors and reasons call arguments as the caller's user knows them:
    ``called(weights_file="--resnet_weights")``."""
    token = _NAMES.set({**_NAMES.get(), **names})
    try:
        yield
    finally:
        _NAMES.reset(token)


def name_of(argument: str) -> str:
    """What a message is to call this argument."""
    return _NAMES.get().get(argument, argument)
