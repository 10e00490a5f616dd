"""Small pipelines with random weights whose transformer reads the text by cross attention, or in
other ways than those of `text_to_image`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .text_to_image import autoencoder, qwen3, t5


def pixart(folder: Path, seed: int = 0, **more: Any) -> Path:
    """PixArt-Sigma in small, saved in `folder`: 20 thousand parameters in the transformer."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    letters = t5(folder.with_name(f"{folder.name}_letters"))
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(letters),
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = diffusers.PixArtTransformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "caption_channels": 32,
            "cross_attention_dim": 24,
            "in_channels": 4,
            "out_channels": 8,
            "use_additional_conditions": False,
            **more,
        }
    )
    diffusers.PixArtSigmaPipeline(
        letters,
        encoder,
        autoencoder(scaling_factor=0.13025),
        transformer,
        diffusers.DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)
    return folder


def gemma(folder: Path) -> tuple[Any, Any]:
    """A text encoder, and a tokenizer of letters with bytes for the rest."""
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256))]
    tokens += ["▁", *(chr(c) for c in range(ord("a"), ord("z") + 1))]
    words = GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    words.save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        head_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return Gemma2Model(config).eval(), GemmaTokenizer.from_pretrained(folder)


def sana(folder: Path, seed: int = 0, **more: Any) -> Path:
    """Sana in small, saved in `folder`: 53 thousand parameters in the transformer, latents a
    quarter of the picture's side, of which its pipeline takes multiples of 32."""
    import diffusers

    torch.manual_seed(seed)
    encoder, words = gemma(folder.with_name(f"{folder.name}_words"))
    sides = {
        f"{side}_{what}": given
        for side in ("encoder", "decoder")
        for what, given in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 8),
            "qkv_multiscales": ((), (), (5,)),
            "layers_per_block": (1, 1, 1),
        }.items()
    }
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
        **sides,
    )
    transformer = diffusers.SanaTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 8,
            **more,
        }
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    diffusers.SanaPipeline(words, encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


def qwen_image(folder: Path, seed: int = 0, **more: Any) -> Path:
    """Qwen-Image in small, saved in `folder`."""
    import diffusers
    import transformers

    torch.manual_seed(seed)
    _, words = qwen3(folder.with_name(f"{folder.name}_words"), "Qwen3Model", 1)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(words),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "mrope_section": [1, 1, 2],
                    "rope_type": "default",
                    "type": "default",
                    "rope_theta": 1e6,
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
            image_token_id=0,
            video_token_id=0,
            vision_start_token_id=0,
            vision_end_token_id=0,
        )
    ).eval()
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.1, 2.0],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        **{
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            **more,
        }
    )
    diffusers.QwenImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae,
        encoder,
        words,
        transformer,
    ).save_pretrained(folder)
    return folder
