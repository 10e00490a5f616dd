"""FLUX.2 klein, base and distilled.

The transformer takes the outputs of three of Qwen3's layers, and latents packed by four that are
normalised channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

from ...errors import InputError
from .family import Config, Family
from .flow_matching import STEPWISE, TARGETS
from .flux import MODULES
from .qwen3 import TOKENS, Qwen3

LAYERS = 3  # layers of Qwen3 whose outputs the transformer takes
DEEPEST = 27


class Klein(Qwen3):
    name = "FLUX.2 klein"
    made = "Qwen3 and a transformer"
    pipeline = Flux2KleinPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (Flux2Transformer2DModel, "config.json"),
        "vae": (AutoencoderKLFlux2, "config.json"),
        "text_encoder": (Qwen3ForCausalLM, "config.json"),
        "tokenizer": (Qwen2Tokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    tags = ("flux2",)
    packed = 4
    thinking = False
    modules = MODULES
    lora_targets: Sequence[str] = (
        *TARGETS,
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    units: Sequence[str] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    usual = 4.0

    def of(self, index: Mapping[str, Any]) -> Family:
        return KleinDistilled() if index.get("is_distilled") else self

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        config, text = configs["transformer"], configs["text_encoder"]
        self.fits(name, config.get("joint_attention_dim", 0), text.get("hidden_size", 0), LAYERS)
        if (layers := text.get("num_hidden_layers", 0)) < DEEPEST:
            raise InputError(
                f"{name}: its text encoder has {layers} layers; klein needs the outputs of the "
                f"9th, 18th and {DEEPEST}th"
            )
        if config.get("guidance_embeds"):
            raise InputError(
                f"{name}: its transformer takes a guidance scale, as FLUX.2 dev does; {self.name} "
                "has none"
            )

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        channels, h, w = super().latents(configs, size)
        return 4 * channels, h // 2, w // 2

    def step(self, configs: Mapping[str, Config]) -> int:
        return 2 * self.factor(configs)

    patch = 1  # the latents are packed already

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        mode = [vae.encode(x[None].to(vae.device)).latent_dist.mode() for x in pixels]
        mean, spread = _normal(vae)
        return ((Flux2KleinPipeline._patchify_latents(torch.cat(mode)) - mean) / spread).cpu()

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        mean, spread = _normal(vae)
        return vae.decode(Flux2KleinPipeline._unpatchify_latents(latents * spread + mean)).sample

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 8) -> dict[str, Tensor]:
        found = [
            pipe.encode_prompt(
                list(texts[i : i + batch]),
                device=pipe.text_encoder.device,
                max_sequence_length=TOKENS,
            )[0]
            .float()
            .cpu()
            for i in range(0, len(texts), batch)
        ]
        return {"encoder_hidden_states": torch.cat(found)}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["joint_attention_dim"])}

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / n, n), "mu": compute_empirical_mu(tokens, n)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        text = told["encoder_hidden_states"]
        out = denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(x_t),
            timestep=t / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1]).to(x_t.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_t[:1]).to(x_t.device),
        ).sample
        return out.transpose(1, 2).reshape(x_t.shape)


class KleinDistilled(Klein):
    name = "FLUX.2 klein, distilled"

    def guides(self, config: Config) -> str:
        return ""

    def distilled(self, name: str, config: Config) -> str | None:
        return STEPWISE.format(name, "FLUX.2 klein base")


def _normal(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, by which klein's latents are normalised."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)
