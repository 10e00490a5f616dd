"""The single dispatch over the implementations of one contract (see `reference`).

``fused`` has the meaning that torch.optim gives it: None takes the best implementation for the
tensors at hand, True insists on a fused one, False takes the plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from . import reference

__all__ = ["backend", "reference"]


def backend(tensors: Sequence[Tensor], fused: bool | None) -> ModuleType:
    """The module whose `threshold` and `combine` serve these tensors.

    Raises:
        RuntimeError: `fused=True` and there is no fused implementation for them.
    """
    if fused:
        devices = sorted({t.device.type for t in tensors})
        raise RuntimeError(
            f"fused=True: this version has no fused kernel for parameters on {devices}; "
            "leave fused=None to take the best implementation there is"
        )
    return reference
