"""Small checkpoints in one file, of every family, and what is drawn with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .text_to_image import LENGTH, pipeline, tokenizer

FAMILIES = ("sd1", "sd2", "sd1_inpainting", "sdxl")


def folder(family: str, to: Path) -> Path:
    """A small pipeline with random weights, as a diffusers folder."""
    if family == "sdxl":
        return sdxl(to)
    pipeline(to, "v_prediction" if family == "sd2" else "epsilon")
    return inpainting(to) if family.endswith("inpainting") else to


def sdxl(to: Path, seed: int = 0) -> Path:
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    words = tokenizer(to.with_name(f"{to.name}_words"))
    one, two = (
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            projection_dim=16,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        for width in (16, 24)
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    StableDiffusionXLPipeline(
        vae,
        CLIPTextModel(one),
        CLIPTextModelWithProjection(two),
        words,
        words,
        unet,
        scheduler,
        add_watermarker=False,
    ).save_pretrained(to)
    return to


def inpainting(to: Path, kind: str = "StableDiffusionInpaintPipeline") -> Path:
    """The pipeline in the folder, with a UNet of nine channels."""
    import diffusers

    given = {} if "XL" in kind else {"safety_checker": None}
    pipe = getattr(diffusers, kind).from_pretrained(to, **given)
    torch.manual_seed(1)
    pipe.register_modules(
        unet=diffusers.UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    )
    pipe.save_pretrained(to)
    return to


def draw(pipe: Any) -> Tensor:
    """Two pictures of two steps."""
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"height": 16, "width": 16}
    if "Inpaint" in type(pipe).__name__:
        options |= {
            "image": Image.new("RGB", (16, 16), "red"),
            "mask_image": Image.new("L", (16, 16), 255),
        }
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return torch.from_numpy(
            pipe(
                ["a cat", "red car"],
                num_inference_steps=2,
                guidance_scale=3.0,
                generator=generator,
                output_type="np",
                **options,
            ).images
        )


def tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def resaved(
    source: Path,
    to: Path,
    *,
    dtype: torch.dtype | None = None,
    add: Mapping[str, Tensor] | None = None,
    drop: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] = lambda name: name,
    said: Mapping[str, str] | None = None,
) -> Path:
    from safetensors.torch import save_file

    held = {rename(n): t.to(dtype or t.dtype) for n, t in tensors(source).items() if not drop(n)}
    save_file(held | dict(add or {}), to, metadata=dict(said or {}))
    return to


def same_bytes(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    return all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in names
    )
