"""The sizes that are measured: flat vectors, and the tensors of two real models."""

from __future__ import annotations

import math
from typing import Any

import torch

DDPM, SD = "DDPM", "SD 1.x"


def ddpm() -> Any:
    """google/ddpm-cifar10-32, the paper's UNet for CIFAR-10 (without its class embedding)."""
    from diffusers import UNet2DModel

    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"  # at 16x16
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        act_fn="silu",
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def stable_diffusion() -> Any:
    """The UNet of Stable Diffusion 1.x: diffusers' defaults but for the width of the text."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768)


def model_shapes(name: str) -> list[torch.Size]:
    """The shapes of a model's parameters; no memory is taken."""
    build, millions = {DDPM: (ddpm, 35.7), SD: (stable_diffusion, 859.5)}[name]
    with torch.device("meta"):
        shapes = [p.shape for p in build().parameters()]
    n = sum(map(math.prod, shapes))
    assert round(n / 1e6, 1) == millions, f"{name} has {n} parameters: another config?"
    return shapes


def parts(n: int, count: int) -> list[torch.Size]:
    """n scalars in `count` tensors of one size; the last takes the rest."""
    sizes = [n // count] * (count - 1)
    return [torch.Size([s]) for s in (*sizes, n - sum(sizes))]


#: by rising size: what was slow in one case is left out of the next
CASES = ("1e5", "1e6", DDPM, f"{DDPM}, flat", "1e8", SD, f"{SD}, flat")


def case_shapes(case: str) -> list[torch.Size]:
    """The tensors of a case of `CASES`, or of a number of scalars in one tensor."""
    name, _, flat = case.partition(", ")
    if name not in (DDPM, SD):
        return parts(int(float(name)), 1)
    shapes = model_shapes(name)
    return parts(sum(map(math.prod, shapes)), 1) if flat else shapes
