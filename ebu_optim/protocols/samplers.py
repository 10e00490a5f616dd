"""The samplers of published code, on the noise schedule of a model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from .._extras import require
from .protocol import Asked

#: The settings of a noise schedule; the others belong to a sampler.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


def scheduler(kind: str, pipe: Any) -> Any:
    """A sampler for a pipeline's noise schedule.

    "lms" is built as in hand-written loops; "ddim" has eta 0 and the timesteps of CompVis; "pndm"
    is that of Stable Diffusion 1.4; "dpm" is DPM-Solver++ of order 2. The settings of the
    pipeline's own sampler, such as the spacing of timesteps, are not used, as they are not part of
    a protocol.
    """
    schedule = {k: v for k, v in pipe.scheduler.config.items() if k in SCHEDULE}
    compvis = {"set_alpha_to_one": False, "steps_offset": 1}
    if kind == "ddim":
        return DDIMScheduler(**schedule, **compvis, clip_sample=False)
    if kind == "pndm":
        return PNDMScheduler(**schedule, **compvis, skip_prk_steps=True)
    if kind == "lms":
        require("scipy", "metrics")
        return LMSDiscreteScheduler(**schedule)
    return DPMSolverMultistepScheduler(**schedule)


def noise(pipe: Any, asked: Asked, size: tuple[int, int], device: str) -> Tensor:
    """The starting noise (1, C, h, w) float32 of a picture of `size` (width, height)."""
    scale, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
    shape = (asked.nth + 1, channels, size[1] // scale, size[0] // scale)
    source = torch.Generator(device).manual_seed(asked.seed)
    return torch.randn(shape, generator=source, device=device)[-1:]
