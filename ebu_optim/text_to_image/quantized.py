"""Quantize the frozen denoiser under a LoRA to 8 or 4 bits.

int8 is torchao's weight-only quantization, with a scale per row. nf4 is that of bitsandbytes, with
an 8-bit scale per 64 weights (QLoRA, https://arxiv.org/abs/2305.14314). Only the Linear layers of
the denoiser's blocks are quantized; the layers outside of the blocks are small.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._extras import require
from ..errors import InputError

Quantize = Literal["int8", "nf4"]
EXTRA = "quantized"
PACKAGES = {"int8": "torchao.quantization", "nf4": "bitsandbytes"}
#: Bytes per weight; for nf4 with its share of the scale of 64 weights.
BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64}


def layers(denoiser: nn.Module, units: Collection[str]) -> dict[str, nn.Linear]:
    """The frozen Linear layers, by name, inside modules whose class name is in `units`."""
    inside = tuple(f"{n}." for n, m in denoiser.named_modules() if type(m).__name__ in units)
    return {
        n: m
        for n, m in denoiser.named_modules()
        if type(m) is nn.Linear and n.startswith(inside) and not m.weight.requires_grad
    }


def check(how: Quantize | None) -> None:
    """Check that the package for this quantization is installed.

    Raises:
        InputError: the package is missing.
    """
    if how is None:
        return
    try:
        require(PACKAGES[how], EXTRA)
    except ImportError as error:
        raise InputError(f"--quantize {how}: {error}") from error


def keep_apart(model: nn.Module) -> None:
    """Exclude the frozen weights from DistributedDataParallel.

    It broadcasts all weights at its start, which fails for 8-bit weights. Every process has
    quantized the same weights, so no broadcast is necessary."""
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)


def quantize(denoiser: nn.Module, how: Quantize, units: Collection[str], device: Any) -> None:
    """Quantize these layers in place; each is moved to `device` and stays there."""
    package: Any = require(PACKAGES[how], EXTRA)
    for name, layer in layers(denoiser, units).items():
        owner, _, last = name.rpartition(".")
        layer.to(device)
        if how == "int8":
            package.quantize_(layer, package.Int8WeightOnlyConfig())
            layer.__class__ = _Int8Linear  # peft and diffusers still see an nn.Linear
        else:
            setattr(denoiser.get_submodule(owner), last, _nf4(package, layer, device))


class _Int8Linear(nn.Linear):
    """Torchao's layer, whose backward pass saves no dequantized weight.

    That weight would be as large as the original one. The layer of bitsandbytes does the same."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, _Frozen.apply(x, self.weight, self.bias))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.weight.dequantize()
        return grad.to(weight.dtype) @ weight, None, None


def _nf4(package: Any, layer: nn.Linear, device: Any) -> nn.Module:
    weight, bias = layer.weight, layer.bias
    with torch.device("meta"):
        found = package.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
        )
    found.weight = package.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    if bias is not None:
        found.bias = nn.Parameter(bias.data, requires_grad=False)
    # its packed CPU format supports only multiples of 32, and an evaluation between steps packs
    found.support_avx512bf16_for_cpu = False
    return found.to(device)


def saved(denoiser: nn.Module, how: Quantize | None, units: Collection[str], whole: int) -> int:
    """Bytes that quantization saves if a weight takes `whole` bytes without it."""
    if how is None:
        return 0
    numel = sum(m.weight.numel() for m in layers(denoiser, units).values())
    return int(numel * (whole - BYTES[how]))
