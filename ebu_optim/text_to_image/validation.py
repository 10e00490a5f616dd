"""Validation images: the same prompts and starting noise every --validation_steps steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..diffusion import evaluating, sample
from ..errors import InputError
from ..training.fields import option
from .modules import Prompted
from .pipelines import load


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """The options of the validation images."""

    group: ClassVar[str] = "validation"

    validation_prompts: list[str] | None = option(
        None,
        help="Prompts of the validation images. Default: one prompt to forget and three to "
        "remember.",
    )
    validation_steps: int = option(
        250, help="Generate validation images every this many steps; 0 generates none."
    )
    num_validation_images: int = option(2, help="Validation images of each prompt.")
    validation_inference_steps: int = option(25, help="Steps of each validation image.")
    validation_guidance_scale: float | None = option(
        None, help="Guidance scale of the validation images. Default: that of the model's family."
    )

    def check_validation(self) -> None:
        """Check the values.

        Raises:
            InputError: a value is out of range.
        """
        if self.validation_steps < 0:
            raise InputError(f"--validation_steps must be >= 0; got {self.validation_steps}")
        scale = self.validation_guidance_scale
        if scale is not None and not 0 <= scale < math.inf:
            raise InputError(f"--validation_guidance_scale must be finite, >= 0; got {scale}")
        for name in ("num_validation_images", "validation_inference_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1; got {getattr(self, name)}")


@torch.no_grad()
def draw(
    args: Any,
    model: Prompted,
    scheduler: Any,
    labels: list[int],
    null: int,
    shape: tuple[int, ...],
    folder: Path,
) -> Tensor:
    """Images (n, 3, H, W) uint8 on the CPU, ordered by prompt.

    The VAE is on the model's device only while it decodes. Global random states do not change."""
    device = next(model.parameters()).device
    rows = torch.tensor(labels).repeat_interleave(args.num_validation_images)
    family, ddim = model.family, model.family.sampler(scheduler)
    options = {
        "num_inference_steps": args.validation_inference_steps,
        "clip": False,
        "device": device,
        "guidance_scale": family.away(model.denoiser.config, args.validation_guidance_scale),
        "null_condition": null,
    }
    with torch.random.fork_rng(), evaluating(model):
        latents = []
        for i in range(len(rows)):
            g = torch.Generator().manual_seed(args.seed + i % args.num_validation_images)
            latents.append(sample(model, ddim, rows[i : i + 1], shape, generator=g, **options))
        vae = load(family.kind("vae"), folder / "vae", args.variant).to(device)
        images = [family.to_pixels(vae, x).cpu() for x in latents]
    return torch.cat(images).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def write(args: Any, accelerator: Any, images: Tensor, step: int) -> None:
    """Save a PNG with one row per prompt, and log the images to the trackers."""
    path = args.output_dir / "validation" / f"step_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = images.unflatten(0, (-1, args.num_validation_images)).permute(0, 3, 1, 4, 2)
    Image.fromarray(rows.flatten(0, 1).flatten(1, 2).contiguous().numpy()).save(path)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            pixels = images.permute(0, 2, 3, 1).numpy()
            order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": pixels}, step=step, **order)
