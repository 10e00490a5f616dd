"""Stable Diffusion 3 and 3.5: a transformer with joint attention of image and text.

The text comes from two CLIP text encoders and from T5, which a pipeline may leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from transformers import (  # type: ignore[attr-defined]
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from ...errors import InputError
from .family import Config, Family
from .flow_matching import STEPWISE, TARGETS, FlowMatching, inside
from .sdxl import check_alike
from .unets import Choice

TOKENS = 256  # at most, of T5 or zeros in their place: the default of the pipeline's call


class SD3WithoutT5(FlowMatching):
    name = "Stable Diffusion 3 and 3.5"
    made = "three text encoders and a transformer"
    pipeline = StableDiffusion3Pipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (SD3Transformer2DModel, "config.json"),
        "vae": (AutoencoderKL, "config.json"),
        "text_encoder": (CLIPTextModelWithProjection, "config.json"),
        "tokenizer": (CLIPTokenizer, "tokenizer_config.json"),
        "text_encoder_2": (CLIPTextModelWithProjection, "config.json"),
        "tokenizer_2": (CLIPTokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    absent: Sequence[str] = ("text_encoder_3", "tokenizer_3")
    foreign = frozenset({"unet", "controlnet"})
    tags = ("stable-diffusion-3",)
    density = "logit_normal"
    modules: Mapping[str, Choice] = {
        # the image's reading of the text, like attn2 of a UNet
        "xattn": inside(".attn.add_k_proj.", ".attn.add_v_proj."),
        "attention": inside(".attn.", ".attn2."),
        "context": inside(".context_embedder."),
        "full": inside(""),
    }
    lora_targets = TARGETS
    units = ("JointTransformerBlock",)
    searched: Sequence[str] = ("text_encoder", "text_encoder_2")

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        config, clips = configs["transformer"], list(map(configs.get, SD3WithoutT5.encoders))
        pooled = sum((c or {}).get("projection_dim", 512) for c in clips)
        joint, takes = (config.get(f"{n}_dim") for n in ("joint_attention", "pooled_projection"))
        t5 = configs.get("text_encoder_3", {}).get("d_model", joint)
        if (takes, joint) != (pooled, t5):
            raise InputError(
                f"{name}: the transformer takes text embeddings of {joint} and pooled ones of "
                f"{takes}, its text encoders make {t5} and {pooled}"
            )
        if configs["scheduler"].get("use_dynamic_shifting"):
            raise InputError(
                f"{name}: its scheduler has use_dynamic_shifting; {self.name} has a fixed shift"
            )

    def check_tokenizers(self, name: str, tokenizers: Mapping[str, Any]) -> None:
        check_alike(name, tokenizers["tokenizer"], tokenizers["tokenizer_2"])

    def distilled(self, name: str, config: Config) -> str | None:
        if "turbo" not in Path(name).name.lower():
            return None
        return STEPWISE.format(name, "the model that is not turbo")

    def step(self, configs: Mapping[str, Config]) -> int:
        return self.factor(configs) * configs["transformer"].get("patch_size", 2)

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        most = self.step(configs) * configs["transformer"].get("pos_embed_max_size", 96)
        if size > most:
            raise InputError(f"--resolution must be <= {most} for this model; got {size}")
        return super().latents(configs, size)

    def reader(self, folder: Path, variant: str | None, parts: Mapping[str, Any]) -> Any:
        with torch.device("meta"):  # the pipeline takes the width of T5's zeros from its config
            config = SD3Transformer2DModel.load_config(folder, subfolder="transformer")
            wide = SD3Transformer2DModel.from_config(config)
        return super().reader(folder, variant, {**parts, "transformer": wide})

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        found = []
        for i in range(0, len(texts), batch):
            some = list(texts[i : i + batch])
            told = pipe.encode_prompt(
                prompt=some,
                prompt_2=some,
                prompt_3=some,
                device=pipe.text_encoder.device,
                do_classifier_free_guidance=False,
                **self.drawing(pipe, 0),
            )
            found.append([t.float().cpu() for t in (told[0], told[2])])
        text, pooled = (torch.cat(parts) for parts in zip(*found))
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        third = pipe.tokenizer_3
        return {"max_sequence_length": min(TOKENS, third.model_max_length) if third else TOKENS}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {
            "encoder_hidden_states": (length + TOKENS, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=told["encoder_hidden_states"],
            pooled_projections=told["pooled_projections"],
        ).sample


class SD3(SD3WithoutT5):
    parts: Mapping[str, tuple[Any, str]] = {
        **SD3WithoutT5.parts,
        "text_encoder_3": (T5EncoderModel, "config.json"),
        "tokenizer_3": (T5TokenizerFast, "tokenizer_config.json"),
    }
    absent = ()
    encoders: Mapping[str, str] = {**SD3WithoutT5.encoders, "text_encoder_3": "tokenizer_3"}

    def of(self, index: Mapping[str, Any]) -> Family:
        gone = (index.get("text_encoder_3") or [None])[-1] is None
        return SD3WithoutT5() if gone else self

    def reader(self, folder: Path, variant: str | None, parts: Mapping[str, Any]) -> Any:
        return Family.reader(self, folder, variant, parts)
