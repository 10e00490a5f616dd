"""Chooses one of the implementations of the kernels' contract (see `reference`).

``fused`` has the meaning of torch.optim: None takes the best implementation for the tensors, True
requires a fused one, False takes the plain one.
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

# In addition to the contract, a fused backend has `available()`: None if it can run here, else the
# reason; and `takes(tensors)`: the same for these tensors. `walks(tensors)`, if it has that, is
# quicker: True means that it takes them, and that float32 holds them.
_FUSED = {"cpu": "cpu", "cuda": "triton"}


@cache
def _fused(device: str) -> tuple[ModuleType | None, str]:
    """Return the fused backend for a device type, or None and the reason why there is none."""
    name = _FUSED.get(device)
    if name is None:
        return None, f"this version has no fused kernels for {device}"
    module: Any = importlib.import_module(f".{name}", __name__)
    reason = module.available()
    return (None, reason) if reason else (module, "")


def _choose(tensors: Sequence[Tensor]) -> tuple[ModuleType | None, str]:
    first, _ = _fused(tensors[0].device.type) if tensors else (None, "")
    if first is not None and walks(first, tensors):
        return first, ""
    devices = sorted({device.type for device in set(map(attrgetter("device"), tensors))})
    if len(devices) != 1:
        return None, f"parameters on {', '.join(devices) or 'no device'}"
    module, reason = _fused(devices[0])
    refused = module.takes(tensors) if module is not None else None
    return (None, refused) if refused else (module, reason)


def walks(backend: Any, *columns: Sequence[Tensor]) -> bool:
    """Whether a backend knows all these tensors as its own, of float32 at most."""
    return hasattr(backend, "walks") and all(map(backend.walks, columns))


def backend(tensors: Sequence[Tensor], fused: bool | None) -> ModuleType:
    """Return the module whose functions serve these tensors.

    It has `select`, `histogram`, `combine`, `scale`, `restore` and `finite_probe` as in
    `reference`.

    Raises:
        RuntimeError: `fused=True`, but no fused implementation serves these tensors.
    """
    if fused is False:
        return chunked
    module, reason = _choose(tensors)
    if module is None and fused:
        raise RuntimeError(
            f"fused=True, but {reason}; use fused=None for the best available implementation"
        )
    return module or chunked


def active(device: str = "cpu") -> str:
    """Return which kernels serve a device type ("cpu", "cuda"), and why.

    >>> active("meta")
    'reference (plain torch): this version has no fused kernels for meta'
    """
    module, reason = _fused(device)
    if module is None:
        return f"reference (plain torch): {reason}"
    return f"{module.__name__.rpartition('.')[2]} (fused)"
