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
from ..errors import InputError
from ..text_to_image.families import Family, named
from ..text_to_image.families.flow_matching import FlowMatching
from .protocol import Asked, Protocol

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
    a protocol. "flow" is Euler's method at the times of a flow matching model's own
    pipeline.
    """
    if kind == "flow":
        return named(type(pipe).__name__).sampler(pipe.scheduler)
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


def check(family: Family, protocol: Protocol, model: str) -> None:
    """Check that a model can be sampled by the protocol's sampler.

    Raises:
        InputError: a flow matching model, for which no protocol was published, with a sampler of
            noise schedules, or the other way round.
    """
    flow, kind = isinstance(family, FlowMatching), protocol.sampling.sampler
    if flow == (kind == "flow"):
        return
    if flow:
        raise InputError(
            f"--protocol {protocol.name} samples by {kind}, and {model} is a {family.name}, a flow "
            "matching model, which has no such sampler: give --change sampler=flow, Euler's method "
            "at the model's own times, which changes the label"
        )
    raise InputError(
        f"--change sampler=flow: {model} is a {family.name}, which is no flow matching model: "
        "leave it out"
    )


def generator(pipe: Any, asked: Asked, size: tuple[int, int], device: str) -> torch.Generator:
    """A generator whose next draw is the noise of an image.

    The pipelines of flow matching models sample their noise by themselves, as some of them pack it.
    """
    source = torch.Generator(device).manual_seed(asked.seed)
    if asked.nth:
        family = named(type(pipe).__name__)
        names = ("vae", family.denoiser)
        configs = {name: getattr(pipe, name).config for name in names}
        (channels, width, _), (_, height, _) = (family.latents(configs, side) for side in size)
        torch.randn(asked.nth, channels, height, width, generator=source, device=device)
    return source


def noise(pipe: Any, asked: Asked, size: tuple[int, int], device: str) -> Tensor:
    """The starting noise (1, C, h, w) float32 of an image of `size` (width, height)."""
    scale, channels = pipe.vae_scale_factor, pipe.vae.config.latent_channels
    shape = (asked.nth + 1, channels, size[1] // scale, size[0] // scale)
    source = torch.Generator(device).manual_seed(asked.seed)
    return torch.randn(shape, generator=source, device=device)[-1:]
