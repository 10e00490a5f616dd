"""The fused kernels for CUDA: the contract of `reference` without waiting for the device.

The number of launches does not grow with the number of tensors or pools.

Selection, for both gradients and every pool at once:

1. A sample of each large pool, drawn on the device, guesses a window of at most WIDTH bins of the
   keys' upper 15 bits. Pools with fewer than WINDOW_MIN elements have none.
2. One pass counts the keys above the window, and the keys inside by their exact value. This proves
   the guess, and then the key is known; or it refutes the guess.
3. A radix selection (8 + 8 + 8 + 7 bits) serves the remaining pools. It is always launched, and
   ends at once if there are none.

The combination is one pass over all columns, in place. A small second kernel adds up its sums.

What these kernels do not support (float64, layouts that differ between columns, theta0 or F on
another device) goes to `chunked`: single rows of a combination, or a whole selection. With
TRITON_INTERPRET=1, set before Triton is imported, all of this runs on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ._launch import interpreted, runs_on
from ._launch_combination import combine, restore
from ._launch_selection import finite_probe, histogram, select
from ._tables import KINDS
from .chunked import scale  # its torch._foreach_mul_ takes many tensors per launch

__all__ = [
    "available",
    "combine",
    "finite_probe",
    "histogram",
    "restore",
    "scale",
    "select",
    "takes",
]


@cache
def available() -> str | None:
    """Return None if these kernels can run, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds for Linux)"
    try:
        from . import _triton_kernels  # noqa: F401
    except Exception as error:  # this Triton does not fit the torch, Python or driver
        return f"Triton cannot be imported: {error}"
    if interpreted():
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":  # set when Triton is imported
            return "TRITON_INTERPRET=1 was set after Triton had been imported"
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "these kernels are compiled only for CUDA"
    return None


@cache
def _refuses(device: torch.device) -> str | None:
    """Return why a card is not supported, or None.

    It may be too old for these kernels, or Triton cannot serve it here (no C compiler, a Triton
    without that card). One small launch per device finds out.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the kernels need compute capability 7.0, {device} has {major}.{minor}"
    try:
        finite_probe([torch.ones(16, device=device)])
    except Exception as error:
        return f"Triton's first launch on {device} failed: {type(error).__name__}: {error}"
    return None


def takes(tensors: Sequence[Tensor]) -> str | None:
    """Return None if these kernels serve such parameters, else the reason."""
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        return f"parameters are on {len(devices)} devices"
    (device,) = devices
    if not runs_on(device):
        return f"Triton's kernels do not run on {device}"
    if all(t.dtype not in KINDS for t in tensors):
        return "all parameters are " + ", ".join(sorted({str(t.dtype) for t in tensors}))
    return _refuses(device) if device.type == "cuda" else None
