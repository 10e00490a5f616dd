"""Released models with a transformer, described by what differs from diffusers' default configs.

This is enough to count the memory that they need without one of their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..text_to_image.families import FAMILIES
from ..text_to_image.pipelines import Looked

Config = Mapping[str, Any]

CLIP_L: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: Config = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL: Config = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
QWEN3_4B: Config = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3_8B: Config = {
    **QWEN3_4B,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
VAE: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
OF_SD3: Mapping[str, Config] = {
    "vae": VAE,
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
    "text_encoder_3": T5_XXL,
}
MEDIUM: Config = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": list(range(13)),
}
LARGE: Config = {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
KLEIN_4B: Config = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B: Config = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
SIGMA: Config = {
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
GEMMA_2B: Config = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256000,
    "tie_word_embeddings": True,
}
DC: Config = {
    f"{side}_{what}": given
    for side in ("encoder", "decoder")
    for what, given in {
        "block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "layers_per_block": [2, 2, 2, 3, 3, 3] if side == "encoder" else [3] * 6,
    }.items()
} | {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
QWEN_VL: Config = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
OF_FLUX: Mapping[str, Config] = {"vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}

#: Name -> the pipeline's class and the configurations of its parts.
RELEASED: dict[str, tuple[str, Mapping[str, Config]]] = {
    "Stable Diffusion 3.5 medium": ("StableDiffusion3Pipeline", {"transformer": MEDIUM, **OF_SD3}),
    "Stable Diffusion 3.5 large": ("StableDiffusion3Pipeline", {"transformer": LARGE, **OF_SD3}),
    "FLUX.1 dev": ("FluxPipeline", {"transformer": {"guidance_embeds": True}, **OF_FLUX}),
    "FLUX.2 klein 4B": (
        "Flux2KleinPipeline",
        {"transformer": KLEIN_4B, "vae": {}, "text_encoder": QWEN3_4B},
    ),
    "FLUX.2 klein 9B": (
        "Flux2KleinPipeline",
        {"transformer": KLEIN_9B, "vae": {}, "text_encoder": QWEN3_8B},
    ),
    "PixArt-Sigma XL 1024": (
        "PixArtSigmaPipeline",
        {"transformer": SIGMA, "vae": {**VAE, "latent_channels": 4}, "text_encoder": T5_XXL},
    ),
    "Qwen-Image": ("QwenImagePipeline", {"transformer": {}, "vae": {}, "text_encoder": QWEN_VL}),
    "Sana 1600M": ("SanaPipeline", {"transformer": {}, "vae": DC, "text_encoder": GEMMA_2B}),
    "Z-Image": ("ZImagePipeline", {"transformer": {}, "vae": VAE, "text_encoder": QWEN3_4B}),
}


class Words:
    """A stand-in for a tokenizer where prompts are only counted: one token per byte."""

    model_max_length = 512

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))


def looked(name: str) -> Looked | None:
    """What `pipelines.look` would return for the model's folder; None if this version of
    diffusers lacks the pipeline."""
    kind, parts = RELEASED[name]
    if (family := FAMILIES.get(kind)) is None:
        return None
    with torch.device("meta"):
        whole = {
            part: dict(family.kind(part).from_config(config).config)
            for part, config in parts.items()
            if part not in family.encoders
        }
    configs: dict[str, Any] = {**parts, **whole}
    size = family.size(configs)
    words: Any = Words()
    return Looked(
        Path(name),
        configs[family.denoiser],
        configs["vae"],
        size,
        family.latents(configs, size),
        None,
        words,
        family,
        configs,
    )
