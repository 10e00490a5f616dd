"""The fused kernels for CUDA: the contract of `reference`, launches that do not grow with the
number of tensors or pools, and no wait for the device.

Selection, for both gradients and every pool at once:

1. A sample of each large pool, drawn on the device, guesses a window of at most WIDTH bins of the
   keys' upper 15 bits. Pools under WINDOW_MIN elements have none.
2. One pass counts the keys above the window, and those inside by their exact value. That proves the
   guess, in which case the key is known, or refutes it.
3. A radix selection (8 + 8 + 8 + 7 bits) serves what is left. It is launched always and leaves at
   once where nothing is.

The combination is one pass over all columns, in place; its sums go through one small second kernel.

What these kernels do not take (float64, layouts that differ between columns, theta0 or F on another
device) goes to `chunked`: the rows of a combination one by one, a selection as a whole. With
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
from .chunked import scale  # its torch._foreach_mul_ takes many tensors a launch

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
    """None where these kernels can run, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds for Linux)"
    try:
        from . import _triton_kernels  # noqa: F401
    except Exception as error:  # a Triton that does not fit this torch, Python or driver
        return f"Triton cannot be imported: {error}"
    if interpreted():
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":  # made when Triton was imported
            return "TRITON_INTERPRET=1 was set after Triton had been imported"
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "these kernels are compiled for CUDA alone"
    return None


@cache
def _refuses(device: torch.device) -> str | None:
    """Why a card is not taken: it is too old for these kernels, or Triton cannot serve it here (no
    C compiler, a Triton without that card). One small launch tells, once for each device."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the kernels need compute capability 7.0, {device} has {major}.{minor}"
    try:
        finite_probe([torch.ones(16, device=device)])
    except Exception as error:
        return f"Triton's first launch on {device} failed: {type(error).__name__}: {error}"
    return None


def takes(tensors: Sequence[Tensor]) -> str | None:
    """None where these kernels serve such parameters, else the reason."""
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        return f"parameters lie on {len(devices)} devices"
    (device,) = devices
    if not runs_on(device):
        return f"Triton's kernels do not run on {device}"
    if all(t.dtype not in KINDS for t in tensors):
        return "all parameters are " + ", ".join(sorted({str(t.dtype) for t in tensors}))
    return _refuses(device) if device.type == "cuda" else None
