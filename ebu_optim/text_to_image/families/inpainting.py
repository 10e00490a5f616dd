"""Inpainting models of Stable Diffusion and SDXL. Their UNet also takes the mask and the latents of
the masked image.

Here everything is masked: the mask is ones and the masked image is gray. With these inputs the
model generates from text alone, and this is where it is trained to forget. Inpainting the concept
into a given image is not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from torch import Tensor

from ...errors import InputError
from .family import Config
from .sdxl import SDXL
from .stable_diffusion import StableDiffusion


class _Inpainting(StableDiffusion):
    def check_channels(self, name: str, unet: Config, latent: int) -> None:
        taken, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if (taken, out) != (2 * latent + 1, latent):
            raise InputError(
                f"{name}: the UNet of an inpainting model takes {2 * latent + 1} channels (x_t, "
                f"the mask and the masked image) and predicts {latent}; this one takes {taken} "
                f"and predicts {out}"
            )

    def shared(self, size: int, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        gray = encode(torch.zeros(1, 3, size, size))
        return {**super().shared(size, encode), "masked_image_latents": gray}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        masked = told["masked_image_latents"].expand(len(x_t), -1, -1, -1)
        shown = torch.cat([x_t, torch.ones_like(x_t[:, :1]), masked.to(x_t)], 1)
        return super().predict(denoiser, shown, t, told)

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        gray = torch.zeros(1, 3, size, size)
        return {
            "image": torch.full((1, 3, size, size), 0.5),
            "mask_image": torch.ones(1, 1, size, size),
            "masked_image_latents": self.to_latents(pipe.vae, gray),
            "strength": 1.0,
        }


class Inpainting(_Inpainting):
    name = "Stable Diffusion inpainting"
    pipeline = StableDiffusionInpaintPipeline


class SDXLInpainting(_Inpainting, SDXL):
    name = "Stable Diffusion XL inpainting"
    pipeline = StableDiffusionXLInpaintPipeline
