"""Imports of what is not torch or numpy: a missing one says which extra brings it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise an ImportError that names the extra of this package."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed here and cannot be imported ({error}): "
            f'pip install "ebu_optim[{extra}]"'
        ) from error
