"""The single dispatch over the implementations of one contract (see `reference`).

``fused`` has the meaning that torch.optim gives it: None takes the best implementation for the
tensors at hand, True insists on a fused one, False takes the plain one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from types import ModuleType
from typing import Any

from torch import Tensor

from . import chunked, reference

__all__ = ["active", "backend", "reference"]

# A fused backend has, besides the contract, `available()`: None where it can run here, else why
# not; and `takes(tensors)`: the same for these tensors.
_FUSED = {"cpu": "cpu", "cuda": "triton"}


@cache
def _fused(device: str) -> tuple[ModuleType | None, str]:
    """The fused backend for a type of device, or None and why there is none."""
    name = _FUSED.get(device)
    if name is None:
        return None, f"this version has no fused kernels for {device}"
    module: Any = importlib.import_module(f".{name}", __name__)
    reason = module.available()
    return (None, reason) if reason else (module, "")


def _choose(tensors: Sequence[Tensor]) -> tuple[ModuleType | None, str]:
    devices = sorted({device.type for device in set(map(attrgetter("device"), tensors))})
    if len(devices) != 1:
        return None, f"parameters on {', '.join(devices) or 'no device'}"
    module, reason = _fused(devices[0])
    refused = module.takes(tensors) if module is not None else None
    return (None, refused) if refused else (module, reason)


def backend(tensors: Sequence[Tensor], fused: bool | None) -> ModuleType:
    """The module that serves these tensors: `select`, `histogram`, `combine`, `scale`, `restore`
    and `finite_probe` as in `reference`.

    Raises:
        RuntimeError: `fused=True` and there is no fused implementation for them.
    """
    if fused is False:
        return chunked
    module, reason = _choose(tensors)
    if module is None and fused:
        raise RuntimeError(
            f"fused=True, but {reason}; leave fused=None to take the best implementation there is"
        )
    return module or chunked


def active(device: str = "cpu") -> str:
    """Which kernels serve a type of device ("cpu", "cuda"), and why.

    >>> active("meta")
    'reference (plain torch): this version has no fused kernels for meta'
    """
    module, reason = _fused(device)
    if module is None:
        return f"reference (plain torch): {reason}"
    return f"{module.__name__.rpartition('.')[2]} (fused)"
