"""FLUX.1, dev and schnell.

The transformer takes CLIP's pooled embedding, T5's text embeddings, and latents packed by four; in
dev also the guidance scale as a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import (  # type: ignore[attr-defined]
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from ...errors import InputError
from .family import Config
from .flow_matching import STEPWISE, TARGETS, FlowMatching, inside
from .unets import Choice

#: For FLUX.1 and FLUX.2, whose first blocks have two streams and whose later blocks have one.
MODULES: Mapping[str, Choice] = {
    # the image's reading of the text, in the blocks with two streams
    "xattn": inside(".attn.add_k_proj.", ".attn.add_v_proj."),
    "attention": inside(".attn."),
    "single": inside(".single_transformer_blocks."),
    "context": inside(".context_embedder."),
    "full": inside(""),
}


def shifted(config: Config, tokens: int, n: int) -> dict[str, Any]:
    """n sigmas from 1 to 1 / n, and the shift `mu` that depends on the number of tokens."""
    usual = {
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }
    mu = calculate_shift(tokens, *(config.get(name, value) for name, value in usual.items()))
    return {"sigmas": np.linspace(1.0, 1 / n, n), "mu": mu}


class Flux(FlowMatching):
    name = "FLUX.1"
    made = "CLIP, T5 and a transformer"
    pipeline = FluxPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (FluxTransformer2DModel, "config.json"),
        "vae": (AutoencoderKL, "config.json"),
        "text_encoder": (CLIPTextModel, "config.json"),
        "tokenizer": (CLIPTokenizer, "tokenizer_config.json"),
        "text_encoder_2": (T5EncoderModel, "config.json"),
        "tokenizer_2": (T5TokenizerFast, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    foreign = frozenset({"unet", "controlnet", "image_encoder"})
    tags = ("flux",)
    packed = 4
    modules = MODULES
    lora_targets: Sequence[str] = TARGETS
    units: Sequence[str] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    reads = "tokenizer_2"
    searched: Sequence[str] = ("text_encoder_2",)
    usual = 3.5

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        config = configs["transformer"]
        takes = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 768)
        makes = (
            configs["text_encoder_2"].get("d_model", 512),
            configs["text_encoder"].get("hidden_size", 512),
        )
        if takes != makes:
            raise InputError(
                f"{name}: the transformer takes text embeddings of {takes[0]} and pooled ones of "
                f"{takes[1]}, its text encoders make {makes[0]} and {makes[1]}"
            )

    def guides(self, config: Config) -> str:
        return "told" if config.get("guidance_embeds") else ""

    def distilled(self, name: str, config: Config) -> str | None:
        if not self.guides(config):
            return STEPWISE.format(f"{name} (as FLUX.1 schnell)", "FLUX.1 dev")
        return (
            f"{name} (as FLUX.1 dev) is guidance-distilled: it is trained and generates with the "
            "one --guidance_scale that is given"
        )

    def longest(self, tokenizer: Any, config: Config) -> int:
        return 512 if self.guides(config) else 256

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        found = []
        for i in range(0, len(texts), batch):
            told = pipe.encode_prompt(
                list(texts[i : i + batch]),
                device=pipe.text_encoder.device,
                max_sequence_length=pipe.tokenizer_2.model_max_length,
            )
            found.append([t.float().cpu() for t in told[:2]])
        text, pooled = (torch.cat(parts) for parts in zip(*found))
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (length, config.get("joint_attention_dim", 4096)),
            "pooled_projections": (config.get("pooled_projection_dim", 768),),
        }

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        return shifted(config, tokens, n)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        (n, _, h, w), text = x_t.shape, told["encoder_hidden_states"]
        guidance = told.get("guidance")
        places = torch.cartesian_prod(*(torch.arange(k) for k in (1, h // 2, w // 2)))
        out = denoiser(
            hidden_states=FluxPipeline._pack_latents(x_t, *x_t.shape),
            timestep=t / 1000,
            guidance=None if guidance is None else guidance.expand(n),
            pooled_projections=told["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=places.to(x_t),
        ).sample
        # the pipeline's own inverse works in pixels and differs between versions
        out = out.unflatten(1, (h // 2, w // 2)).unflatten(-1, (-1, 2, 2))
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        return {"max_sequence_length": self.longest(None, pipe.transformer.config)}
