"""Where Triton's kernels run, and the options of their compilation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._tables import KINDS

TILE = 1024
#: No contraction to fused multiply-add, whatever Triton's default is, to agree with `reference`.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(device: torch.device) -> bool:
    return device.type == ("cpu" if interpreted() else "cuda")


def one_device(tensors: Sequence[Tensor]) -> bool:
    """Whether one launch serves all of these tensors."""
    return (
        bool(tensors)
        and runs_on(tensors[0].device)
        and all(t.device == tensors[0].device and t.dtype in KINDS for t in tensors)
    )


def kernels() -> Any:
    from . import _triton_kernels

    return _triton_kernels


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current, because launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
