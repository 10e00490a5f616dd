"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ...diffusion.schedules import prediction_type
from ...errors import InputError
from ..prompts import encode
from .family import Config, Family
from .unets import MODULES


class StableDiffusion(Family):
    name = "Stable Diffusion 1.x and 2.x"
    made = "one text encoder and a UNet"
    pipeline = StableDiffusionPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "unet": (UNet2DConditionModel, "config.json"),
        "vae": (AutoencoderKL, "config.json"),
        "text_encoder": (CLIPTextModel, "config.json"),
        "tokenizer": (CLIPTokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "unet"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"text_encoder_2", "transformer"})
    opened: Mapping[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    tags: tuple[str, ...] = ("stable-diffusion", "stable-diffusion-diffusers")
    modules = MODULES
    no_modules = "its UNet takes the text embeddings without an embedder"
    lora_targets = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    units = ("BasicTransformerBlock", "ResnetBlock2D")

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        self.check_channels(name, configs["unet"], configs["vae"].get("latent_channels", 4))
        widths: list[Any] = [configs[part].get("hidden_size") for part in self.encoders]
        cross = configs["unet"].get("cross_attention_dim")
        if None not in widths and cross != sum(widths):
            raise InputError(
                f"{name}: the UNet takes text embeddings of {cross}, its text encoder makes "
                f"{' + '.join(map(str, widths))}"
            )
        try:
            prediction_type(configs["scheduler"])
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error

    def check_channels(self, name: str, unet: Config, latent: int) -> None:
        """Check the UNet's channels.

        Raises:
            InputError: the UNet does not take and predict latents.
        """
        taken, out = unet.get("in_channels", 4), unet.get("out_channels", 4)
        if taken != latent:
            raise InputError(
                f"{name}: the UNet takes {taken} channels and the VAE makes {latent}: it may be "
                "for inpainting, but its model_index.json says text to image "
                f"({self.pipeline.__name__})"
            )
        if out != taken:
            raise InputError(
                f"{name}: the UNet takes {taken} channels and predicts {out}: these losses need "
                "the same number"
            )

    def step(self, configs: Mapping[str, Config]) -> int:
        blocks = configs["unet"].get("block_out_channels", [0] * 4)
        return self.factor(configs) * 2 ** (len(blocks) - 1)

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        return {"encoder_hidden_states": encode(texts, pipe.tokenizer, pipe.text_encoder, batch)}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (length, config.get("cross_attention_dim", 1280))}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        return denoiser(x_t, t, told["encoder_hidden_states"]).sample
