"""The device of `pytest --device`, and how tests that name none come to run on it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

#: Set before a test file is imported, so that parametrize can ask.
chosen = torch.device("cpu")
DRAW = {torch.normal, torch.rand, torch.randint, torch.randn, torch.randperm}


class OnDevice(TorchFunctionMode):
    """A tensor that names no device is made on this one, and goes back to be read as NumPy.

    Unlike `torch.set_default_device`: random numbers are drawn on the CPU, so that they are those
    of every other device and may come from a CPU's generator; and what `ebu_optim` makes itself is
    left alone, so that a tensor that it makes on the wrong device is found. What no mode sees stays
    on the CPU: `torch.from_numpy` (write `torch.as_tensor`), processes of their own.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.made = _device_constructors() - DRAW - {torch.from_file}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__):
            return func(args[0].cpu(), *args[1:], **kwargs)
        if kwargs.get("device") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if func in self.made and not _package_calls():
            return func(*args, **{**kwargs, "device": self.device})
        made = func(*args, **kwargs)
        if func in DRAW and not _package_calls():
            return made.detach().to(self.device).requires_grad_(made.requires_grad)
        return made


def _package_calls() -> bool:
    """The nearest caller outside torch is the package."""
    frame: Any = sys._getframe(2)
    while frame and _package(frame) == "torch":
        frame = frame.f_back
    return bool(frame) and _package(frame) == "ebu_optim"


def _package(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
