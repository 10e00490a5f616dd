"""Imports of optional packages: the error for a missing one names the extra to install."""

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
            f"{package} cannot be imported ({error}); install it with "
            f'pip install "ebu_optim[{extra}]"'
        ) from error
