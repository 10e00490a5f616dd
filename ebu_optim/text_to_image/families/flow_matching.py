"""What the flow matching families share: the schedule, the sampler, and latents with a shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ...diffusion.flow import NAME, is_flow
from ...errors import InputError
from .family import FOR_UNETS, Config, Family

#: Entries that this package adds to the scheduler's configuration.
OURS = ("weighting_scheme", "image_seq_len")
STEPWISE = (
    "{} is distilled to a few steps, without guidance. Training here uses the velocity at every "
    "time, so images with few steps may get worse; train {}, or generate images with more steps"
)


class Sampler(FlowMatchEulerDiscreteScheduler):
    """Uses the steps that the family's pipeline would set, unless other steps are given."""

    usual: Callable[[int], dict[str, Any]] | None = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        of: dict[str, Any] = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given = {name: value for name, value in of.items() if value is not None}
        if self.usual and num_inference_steps and not given:
            given = self.usual(num_inference_steps)
        super().set_timesteps(num_inference_steps, device, **given)


#: All projections of joint attention, in which image and text have separate streams.
TARGETS = tuple(
    f"attn.{n}"
    for n in (
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )
)


class FlowMatching(Family):
    """An adapter for flow matching.

    Attributes:
        density: the distribution of the sigmas in training, see `ebu_optim.diffusion.flow`.
        packed: factor between the VAE's channels and those that the transformer takes.
        patch: the side of a token, in latents.
    """

    density = "none"
    packed = 1
    wide = False  # T5-XXL and Qwen3 are large, and were published for bfloat16
    patch = 2
    no_modules = "the others select layers of a UNet, and this attention is joint"
    lacks: Mapping[str, str] = FOR_UNETS

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
        if not taken == out == self.packed * latent:
            raise InputError(
                f"{name}: the {self.denoiser} takes {taken} channels and predicts {out}, and the "
                f"VAE makes {latent}: these losses need {self.packed} times the VAE's channels"
            )

    def refuse(self, args: Any) -> None:
        super().refuse(args)
        source = args.pretrained_model_name_or_path
        if getattr(args, "save_as", None) == "single" and not Path(source).is_file():
            raise InputError(
                f"--save_as single: {self.name} needs a given file to write into, and {source} is "
                f"not a file: give the transformer's file with --architecture {source}, or "
                "--save_as pipeline or changed"
            )

    def step(self, configs: Mapping[str, Config]) -> int:
        return self.factor(configs) * self.patch

    def size(self, configs: Mapping[str, Config]) -> int:
        # 128 is the pipelines' default
        return configs[self.denoiser].get("sample_size", 128) * self.factor(configs)

    def schedule(self, folder: Path, latents: Sequence[int]) -> Any:
        found = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        tokens = latents[1] * latents[2] // self.patch**2
        found.register_to_config(weighting_scheme=self.density, image_seq_len=tokens)
        return found

    def sampler(self, schedule: Any) -> Any:
        config = {k: v for k, v in schedule.config.items() if k not in OURS}
        found = Sampler.from_config(config)
        tokens = schedule.config.get("image_seq_len")
        if tokens:  # absent in a pipeline's own scheduler, whose steps the pipeline sets
            found.usual = lambda n: self.steps(schedule.config, tokens, n)
        return found

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        """The arguments of `set_timesteps` with which the pipeline asks for n steps.

        Args:
            tokens: the number of tokens of an image.
        """
        return {}

    def check_steps(self, args: Any, schedule: Any, *names: str) -> None:
        """Accepts any number of steps, as sigmas are continuous."""

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        scaled = super().to_latents(vae, pixels)
        return scaled - (vae.config.shift_factor or 0.0) * vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        shift = vae.config.shift_factor or 0.0
        return vae.decode(latents / vae.config.scaling_factor + shift).sample


def inside(*parts: str) -> Callable[[str, Any], bool]:
    """A choice of the weights whose names contain one of `parts`."""
    return lambda name, _: any(part in f".{name}" for part in parts)
