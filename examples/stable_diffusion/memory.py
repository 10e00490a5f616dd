"""What a run needs in GPU memory, by counting on a UNet without weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from losses import ANCHORS
from method_options import fisher_source, needs
from modules import Prompted, choose
from torch import Tensor, nn
from unlearn_losses import needs_teacher

from ebu_optim.baselines import methods

#: Modules that diffusers' gradient checkpointing recomputes one by one.
UNITS = ("BasicTransformerBlock", "ResnetBlock2D")


class Cost(NamedTuple):
    """Bytes by what they are for, and numbers of parameters."""

    rows: dict[str, int]
    trained: int
    frozen: int

    @property
    def total(self) -> int:
        return sum(self.rows.values())

    def table(self) -> str:
        rows = [*self.rows.items(), ("in all", self.total)]
        unit, name = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
        return "\n".join(f"  {what:<28}{size / unit:7.2f} {name}" for what, size in rows)


def count(
    args: argparse.Namespace, config: dict[str, Any], latents: tuple[int, ...], length: int
) -> Cost:
    """The cost of --method with --train_modules on the UNet of `config`.

    Weights, gradients and optimizer state are exact. Activations are what autograd saves of a pass
    over `length` tokens, with an attention that keeps no matrix of scores (as on CUDA), in float32
    (under mixed precision some are halved). The libraries' workspace comes on top, about 1 GiB.

    Raises:
        InputError: as of `choose`.
    """
    half = args.mixed_precision in ("fp16", "bf16")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        choose(unet, args)
    sizes = {True: 0, False: 0}
    for p in unet.parameters():
        sizes[p.requires_grad] += p.numel()
    trained, frozen = sizes[True], sizes[False]
    penalty = methods[args.method].build.keywords.get("penalty") != "none"
    held = fisher_source(args, "estimate") is not None and penalty and args.fisher != "none"
    mask = args.method == "salun"
    rows = {
        "frozen weights": frozen * (2 if half else 4),
        "trained weights": trained * 4,
        "16-bit copies (autocast)": trained * 2 if half else 0,
        "gradients": trained * 4 * len(needs(args)),
        "Adam's moments": trained * 8,
        "theta0": trained * 4 if held or needs_teacher(args) else 0,
        "F": trained * 4 if held else 0,
        "SalUn's mask": trained if mask else 0,
        "activations": activations(args, unet, latents, length),
    }
    return Cost({k: v for k, v in rows.items() if v}, trained, frozen)


def activations(
    args: argparse.Namespace, unet: nn.Module, latents: tuple[int, ...], length: int
) -> int:
    """Bytes that a forward pass of the batch keeps for its backward pass."""
    n = max(args.train_batch_size, ANCHORS) if args.method == "spm" else args.train_batch_size
    embeddings = torch.empty(1, length, unet.config.cross_attention_dim, device="meta")
    x = torch.empty(n, *latents, device="meta")
    labels = torch.zeros(n, dtype=torch.long, device="meta")
    with (
        saved(unet) as (units, inputs),
        patch("torch.nn.functional.scaled_dot_product_attention", _attention),
    ):
        Prompted(unet, embeddings)(x, torch.zeros(n, device="meta"), labels)
    if not args.gradient_checkpointing:
        return sum(units.values())
    recomputed = {k: v for k, v in units.items() if k is not None}
    return units.get(None, 0) + sum(inputs.values()) + max(recomputed.values(), default=0)


@contextmanager
def saved(unet: nn.Module) -> Iterator[tuple[dict[Any, int], dict[Any, int]]]:
    """Bytes that autograd saves inside the block, by the unit of gradient checkpointing (None:
    outside of all), each storage once and no parameter; and the bytes of the units' inputs."""
    units: dict[Any, int] = {}
    inputs: dict[Any, int] = {}
    inside: list[str] = []
    alive: dict[int, Tensor] = {}  # a storage that is gone could give its name to another
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in alive:
            alive[storage._cdata] = t
            key = inside[-1] if inside else None
            units[key] = units.get(key, 0) + storage.nbytes()
        return t

    def enter(name: str, args: tuple[Any, ...]) -> None:
        inside.append(name)
        inputs[name] = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))

    handles = []
    for name, module in unet.named_modules():
        if type(module).__name__ in UNITS:
            handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: enter(name, args))
            )
            handles.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield units, inputs
    finally:
        for handle in handles:
            handle.remove()


class _Flash(torch.autograd.Function):
    """Saves what a fused attention saves: inputs and output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Flash.apply(q, k, v)
