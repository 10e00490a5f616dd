"""What the families of flow matching share: the schedule, the sampler, and latents with a shift."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...diffusion.flow import NAME, is_flow
from ...errors import InputError
from .family import Config, Family


class FlowMatching(Family):
    """
    Attributes:
        density: which sigmas are learned at, see `ebu_optim.diffusion.flow`.
    """

    density = "none"

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        schedule, latent = configs["scheduler"], configs["vae"].get("latent_channels", 4)
        if not is_flow(schedule) or schedule.get("invert_sigmas"):
            raise InputError(
                f"{name}: its scheduler is a {schedule.get('_class_name')}"
                f"{' with invert_sigmas' if schedule.get('invert_sigmas') else ''}; "
                f"{self.name} has a {NAME}, whose sigma is 1 for noise"
            )
        config = configs[self.denoiser]
        taken = config.get("in_channels", 16)
        out = config.get("out_channels") or taken
        if not taken == out == latent:
            raise InputError(
                f"{name}: the {self.denoiser} takes {taken} channels and predicts {out}, and the "
                f"VAE makes {latent}: these losses need as many"
            )

    def schedule(self, folder: Path) -> Any:
        found = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        found.register_to_config(weighting_scheme=self.density)
        return found

    def sampler(self, schedule: Any) -> Any:
        config = {k: v for k, v in schedule.config.items() if k != "weighting_scheme"}
        return FlowMatchEulerDiscreteScheduler.from_config(config)

    def check_steps(self, args: Any, schedule: Any, *names: str) -> None:
        """Its sigmas are no whole numbers: there may be any number of them."""

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        scaled = super().to_latents(vae, pixels)
        return scaled - (vae.config.shift_factor or 0.0) * vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        shift = vae.config.shift_factor or 0.0
        return vae.decode(latents / vae.config.scaling_factor + shift).sample
