"""The world's autoencoder: images (3, 32, 32) to latents (4, 8, 8) and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .images import SIZE

KL_WEIGHT = 1e-3  # weight of the KL divergence per element of the latent


def new_autoencoder() -> AutoencoderKL:
    """An autoencoder with 0.24 M parameters."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        latent_channels=4,
        layers_per_block=1,
        sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        # with 32 groups each group would be one channel
        norm_num_groups=8,
    )


class Loss:
    """Absolute and squared error of the reconstruction, and a small KL divergence.

    The KL divergence keeps the latents near a unit Gaussian and makes the decoder robust to
    inexact latents."""

    def __init__(self, pictures: Tensor, batch: int, device: torch.device | str) -> None:
        self.pictures, self.batch, self.device = pictures, batch, device

    def __call__(self, model: Any) -> Tensor:
        rows = torch.randint(len(self.pictures), (self.batch,))
        x = self.pictures[rows].to(self.device)
        posterior = model.encode(x).latent_dist
        found = model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(found, x) + F.mse_loss(found, x) + KL_WEIGHT * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """The posterior's mode (n, 4, 8, 8), float32 on the CPU, not scaled."""
    return _in_batches(lambda x: vae.encode(x).latent_dist.mode(), pictures, vae.device, batch)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 256) -> Tensor:
    """Images (n, 3, 32, 32) in [-1, 1] on the CPU, from latents that are not scaled."""
    found = _in_batches(lambda z: vae.decode(z).sample, latents, vae.device, batch)
    return found.clamp(-1, 1)


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Normalise the latents of these images without changing what is decoded.

    The biases before and after the latents give each channel mean 0, and `scaling_factor` becomes
    1 / the standard deviation.

    This is necessary because a pipeline starts at noise with mean 0 and cannot store another mean.

    Returns:
        The scaled latents (n, 4, 8, 8) on the CPU, on which the diffusion model is trained.
    """
    latents = encode(vae, pictures)
    mean = latents.mean((0, 2, 3))
    latents -= mean.view(-1, 1, 1)
    mean = mean.to(vae.device)
    vae.quant_conv.bias[: len(mean)] -= mean  # the first half is the posterior's mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def _in_batches(
    what: Callable[[Tensor], Tensor], x: Tensor, device: torch.device, batch: int
) -> Tensor:
    return torch.cat([what(part.to(device)).float().cpu() for part in x.split(batch)])
