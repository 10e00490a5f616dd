"""Stable Diffusion XL, base.

The conditions come from two text encoders, the second's pooled embedding, and the image's size.
Its VAE overflows in float16; in this package every VAE computes in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from ...errors import InputError
from .family import Config
from .stable_diffusion import StableDiffusion

SIZES = 6  # original size, top left corner and target size, two numbers each


def check_alike(name: str, first: Any, second: Any) -> None:
    """Check that two of CLIP's tokenizers agree.

    Raises:
        InputError: they tokenize a prompt differently.
    """
    same = second.get_vocab() == first.get_vocab()
    if not same or second.model_max_length != first.model_max_length:
        raise InputError(
            f"{name}: its tokenizers have different vocabularies or lengths; only tokenizers that "
            "agree are supported"
        )


class SDXL(StableDiffusion):
    name = "Stable Diffusion XL"
    made = "two text encoders and a UNet"
    pipeline = StableDiffusionXLPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        **StableDiffusion.parts,
        "text_encoder_2": (CLIPTextModelWithProjection, "config.json"),
        "tokenizer_2": (CLIPTokenizer, "tokenizer_config.json"),
    }
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    foreign = frozenset({"transformer"})
    settings = ("force_zeros_for_empty_prompt",)
    opened: Mapping[str, Any] = {}
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    lacks: Mapping[str, str] = dict.fromkeys(
        ("--train_modules xlayer", "--train_modules selflayer"),
        "these are single layers of Stable Diffusion 1.x",
    )

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        unet, pooled = configs["unet"], configs["text_encoder_2"].get("projection_dim", 512)
        if unet.get("addition_embed_type") != "text_time":
            raise InputError(
                f"{name}: its UNet has the addition_embed_type {unet.get('addition_embed_type')!r};"
                " Stable Diffusion XL's is 'text_time'"
            )
        takes = unet.get("projection_class_embeddings_input_dim")
        sizes = SIZES * (unet.get("addition_time_embed_dim") or 0)
        if takes != pooled + sizes:
            raise InputError(
                f"{name}: its UNet takes {takes} numbers in addition to the text, the base "
                f"model's takes {pooled} + {sizes}: the refiner is not supported, as it only "
                "refines images"
            )
        if configs["vae"].get("latents_mean") is not None:
            raise InputError(
                f"{name}: its VAE has a latents_mean; only VAEs with a scaling_factor alone, like "
                "Stable Diffusion XL's, are supported"
            )

    def check_tokenizers(self, name: str, tokenizers: Mapping[str, Any]) -> None:
        check_alike(name, *tokenizers.values())

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        def read(some: Sequence[str], guided: bool) -> list[Any]:
            found = pipe.encode_prompt(list(some), do_classifier_free_guidance=guided)
            return [None if t is None else t.float().cpu() for t in found]

        found = []
        for i in range(0, len(texts), batch):
            some = texts[i : i + batch]
            text, _, pooled, _ = read(some, False)
            if "" in some:
                # the pipeline may replace the encoded "" by zeros for guidance
                _, null, _, pooled_null = read([""], True)
                empty = torch.tensor([t == "" for t in some])
                text[empty], pooled[empty] = null, pooled_null
            found.append((text, pooled))
        text, pooled = (torch.cat(parts) for parts in zip(*found))
        return {"encoder_hidden_states": text, "text_embeds": pooled}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= SIZES * config["addition_time_embed_dim"]
        return {**super().shapes(config, length), "text_embeds": (pooled,)}

    def shared(self, size: int, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        # for an uncropped image of this size, as the pipeline's `_get_add_time_ids`
        return {"time_ids": torch.tensor([[size, size, 0, 0, size, size]]).float()}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        added = {
            "text_embeds": told["text_embeds"],
            "time_ids": told["time_ids"].expand(len(x_t), -1),
        }
        text = told["encoder_hidden_states"]
        return denoiser(x_t, t, text, added_cond_kwargs=added).sample
