"""Sana: a transformer with linear attention that reads Gemma's text by cross attention.

The side of its latents is a 32nd of the image's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizer

from ...diffusion.flow import NAME
from .family import Config
from .flow_matching import OURS, FlowMatching, Sampler
from .pixart import MODULES
from .unets import Choice

TOKENS = 300  # the default of the pipeline's call
#: The instruction that the pipeline puts before a prompt, but not before the empty prompt.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]


def euler(schedule: Config) -> dict[str, Any]:
    """The configuration of a flow for DPM-Solver, converted to one for Euler.

    Euler has another name for the shift and would drop it."""
    if not schedule.get("use_flow_sigmas") or schedule["prediction_type"] != "flow_prediction":
        return dict(schedule)
    of = {"num_train_timesteps": 1000, **schedule}
    return {
        "_class_name": NAME,
        "shift": of.get("flow_shift", 1.0),
        "num_train_timesteps": of["num_train_timesteps"],
    }


class Sana(FlowMatching):
    name = "Sana"
    made = "Gemma 2 and a transformer"
    pipeline = SanaPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (SanaTransformer2DModel, "config.json"),
        "vae": (AutoencoderDC, "config.json"),
        "text_encoder": (Gemma2Model, "config.json"),
        "tokenizer": (GemmaTokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "text_encoder_2"})
    tags = ("sana",)
    modules: Mapping[str, Choice] = MODULES
    no_modules = "the others select layers of a UNet"
    lora_targets: Sequence[str] = tuple(
        f"{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")
    )
    units: Sequence[str] = ("SanaTransformerBlock",)
    lacks: Mapping[str, str] = {
        **FlowMatching.lacks,
        "--half True": "its text encoder and VAE overflow float16; leave it out",
        "--save_as kohya": "ComfyUI cannot load a LoRA for it; give --save_as lora, for diffusers",
    }
    masks: Sequence[str] = ("mask",)
    patch = 1
    usual = 4.5

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, {**configs, "scheduler": euler(configs["scheduler"])})
        config = configs["transformer"]
        width = configs["text_encoder"].get("hidden_size", 0)
        self.fits(name, config.get("caption_channels", 2304), width)

    def factor(self, configs: Mapping[str, Config]) -> int:
        return 2 ** (len(configs["vae"].get("encoder_block_out_channels", [0] * 6)) - 1)

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        side = size // self.factor(configs)
        return configs["vae"].get("latent_channels", 32), side, side

    def step(self, configs: Mapping[str, Config]) -> int:
        own = self.factor(configs) * configs["transformer"].get("patch_size", 1)
        return math.lcm(own, 32)  # the pipeline requires multiples of 32 with any VAE

    def longest(self, tokenizer: Any, config: Config) -> int:
        # The pipeline cuts at TOKENS - 2 plus the instruction, which includes the begin token.
        return TOKENS - 1

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        latents = [vae.encode(x[None].to(vae.device)).latent.cpu() for x in pixels]
        return torch.cat(latents) * vae.config.scaling_factor

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents / vae.config.scaling_factor).sample

    def schedule(self, folder: Path, latents: Sequence[int]) -> Any:
        config = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
        found = FlowMatchEulerDiscreteScheduler.from_config(euler(config))
        found.register_to_config(weighting_scheme=self.density)
        return found

    def sampler(self, schedule: Any) -> Any:
        config = euler(schedule.config)
        found = Sampler.from_config({k: v for k, v in config.items() if k not in OURS})
        last = 1 / found.config.num_train_timesteps
        # the steps of DPM-Solver
        found.usual = lambda n: {"sigmas": np.linspace(1 - last, 0, n + 1)[:-1]}
        return found

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 16) -> dict[str, Tensor]:
        found = []
        for text in texts:
            told = pipe.encode_prompt(
                text,
                do_classifier_free_guidance=False,
                device=pipe.text_encoder.device,
                max_sequence_length=TOKENS,
                complex_human_instruction=INSTRUCTION.default if text else None,
            )
            found.append([t.float().cpu() for t in told[:2]])
        rows, mask = (torch.cat(parts) for parts in zip(*found))
        return {"encoder_hidden_states": rows, "mask": mask}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["caption_channels"]), "mask": (TOKENS,)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        return denoiser(
            x_t,
            encoder_hidden_states=told["encoder_hidden_states"],
            encoder_attention_mask=told["mask"],
            timestep=t * denoiser.config.timestep_scale,
        ).sample

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        return {"use_resolution_binning": False}
