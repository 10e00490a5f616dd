"""Identify the model in a safetensors file by the names and shapes of its tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .header import Header, read_header

#: Family -> part of the pipeline -> prefixes that its tensors may have in the file.
PREFIXES: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {
        "unet": ("model.diffusion_model.", "diffusion_model.", ""),
        "vae": ("first_stage_model.",),
        "text_encoder": ("cond_stage_model.transformer.",),
    },
    "sd2": {
        "unet": ("model.diffusion_model.", "diffusion_model.", ""),
        "vae": ("first_stage_model.",),
        # sgm writes the second prefix
        "text_encoder": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
    },
    "sdxl": {
        "unet": ("model.diffusion_model.", "diffusion_model.", ""),
        "vae": ("first_stage_model.",),
        "text_encoder": ("conditioner.embedders.0.transformer.",),
        "text_encoder_2": ("conditioner.embedders.1.model.",),
    },
}
TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
TAKEN = (
    "Stable Diffusion 1.x, 2.x and SDXL, their inpainting models, and transformers of Stable "
    "Diffusion 3, FLUX.1, FLUX.2 klein, Z-Image, Qwen-Image and Sana are supported"
)


class Transformer(NamedTuple):
    """A flow matching family, of which only the transformer is read from the file.

    Attributes:
        mark: the name of a tensor that only this transformer has.
        title: the name in messages.
        pipeline: the name of the pipeline's class in diffusers.
    """

    mark: str
    title: str
    pipeline: str


TRANSFORMERS = {
    "sd3": Transformer(
        "joint_blocks.0.context_block.attn.qkv.weight",
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
    ),
    "flux": Transformer("double_blocks.0.img_mod.lin.weight", "FLUX.1", "FluxPipeline"),
    "flux2": Transformer(
        "double_stream_modulation_img.lin.weight", "FLUX.2 klein", "Flux2KleinPipeline"
    ),
    "z_image": Transformer("cap_pad_token", "Z-Image", "ZImagePipeline"),
    "qwen_image": Transformer(
        "transformer_blocks.0.txt_mod.1.weight", "Qwen-Image", "QwenImagePipeline"
    ),
    "sana": Transformer("attention_y_norm.weight", "Sana", "SanaPipeline"),
}
PREFIXES |= {
    family: {"transformer": ("", "model.diffusion_model.", "diffusion_model.")}
    for family in TRANSFORMERS
}

FIRST = "input_blocks.0.0.weight"  # in an LDM UNet, of shape (width, channels, 3, 3)
EMA = "model_ema."

#: Ends of names of tensors that scale others, whose weights mean nothing without the scales.
SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".comfy_quant")
ADAPTERS = (
    ".lora_down.",
    ".lora_up.",
    ".lora_A.",
    ".lora_B.",
    ".lora.down.",
    ".hada_w1_",
    ".lokr_w1",
    ".oft_",
    ".glora",
)


class Checkpoint(NamedTuple):
    """What a single file holds.

    Attributes:
        header: the file's header.
        family: "sd1", "sd2" or "sdxl", or a key of `TRANSFORMERS`.
        inpainting: whether the UNet takes 9 channels: latents, a mask, latents of the masked image.
        parts: part of the pipeline in the file -> the prefix of its tensors.
        dtypes: safetensors' names of the dtypes of the weights, the one with the most bytes first.
        ema: the number of tensors of ``model_ema.``, a second UNet that is not used.
    """

    header: Header
    family: str
    inpainting: bool
    parts: Mapping[str, str]
    dtypes: tuple[str, ...]
    ema: int

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def title(self) -> str:
        if self.family in TRANSFORMERS:
            return TRANSFORMERS[self.family].title
        return TITLES[self.family] + (" inpainting" if self.inpainting else "")

    def keys(self, part: str) -> list[str]:
        """The names of the part's tensors in the file."""
        others = [p for name, p in self.parts.items() if name != part] + [EMA]
        prefix = self.parts[part]
        return [
            k
            for k in self.header.tensors
            if k.startswith(prefix) and (prefix or not k.startswith(tuple(others)))
        ]


def look(path: str | os.PathLike[str]) -> Checkpoint:
    """Identify the model in a file from its header.

    Raises:
        InputError: the file is missing, incomplete or not safetensors; it holds only a LoRA, a VAE
            or another part; its family is not supported; it holds quantized weights with scales.
    """
    header = read_header(path)
    tensors = header.tensors
    _refuse_scales(header)
    prefixes = PREFIXES["sd1"]["unet"]
    prefix = next((p for p in prefixes if p + FIRST in tensors), None)
    if prefix is None:
        if transformer := _transformer(header):
            return transformer
        raise InputError(f"{path} {_other(tensors)}: {TAKEN}")
    channels = tensors[prefix + FIRST].shape[1]
    family = _family(header, prefix)
    strange = [k for k in ("edm_mean", "edm_vpred.sigma_max") if k in tensors]
    if channels not in (4, 9) or strange or any(k.startswith("control_model.") for k in tensors):
        what = "a model of EDM" if strange else f"a UNet of {channels} channels"
        raise InputError(f"{path} holds {what}{_inferred(tensors)}: {TAKEN}")
    parts = {
        part: prefix if part == "unet" else found
        for part, places in PREFIXES[family].items()
        if (found := next((p for p in places if _any(tensors, p)), None)) is not None
    }
    ema = sum(k.startswith(EMA) for k in tensors)
    return Checkpoint(header, family, channels == 9, parts, _dtypes(header, parts), ema)


def _transformer(header: Header) -> Checkpoint | None:
    for family, (mark, _, _) in TRANSFORMERS.items():
        for prefix in PREFIXES[family]["transformer"]:
            if prefix + mark in header.tensors:
                parts = {"transformer": prefix}
                return Checkpoint(header, family, False, parts, _dtypes(header, parts), 0)
    return None


def _dtypes(header: Header, parts: Mapping[str, str]) -> tuple[str, ...]:
    sizes: dict[str, int] = {}
    for key, entry in header.tensors.items():
        if key.startswith(tuple(parts.values())):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.last - entry.first
    ordered = sorted(sizes, key=lambda d: -sizes[d])
    return tuple(d for d in ordered if d[0] in "FB" and d != "BOOL")


def is_lora(names: Iterable[str]) -> bool:
    return any(mark in name for name in names for mark in ADAPTERS)


def _any(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _refuse_scales(header: Header) -> None:
    scales = [k for k in header.tensors if k.endswith(SCALES)]
    if scales:
        raise InputError(
            f"{header.path} holds quantized weights with scales ({scales[0]}): give the model in "
            "float16, bfloat16 or float32, or in float8 without scales"
        )


def _family(header: Header, prefix: str) -> str:
    """The family, by the text encoders and the structure of the UNet.

    Apart from the width of the text embeddings it does not depend on sizes, so that small models
    are identified, too."""
    tensors = header.tensors
    inside = [k for k in tensors if k.startswith(prefix)]
    context = next((tensors[k].shape[-1] for k in inside if k.endswith("attn2.to_k.weight")), None)
    if f"{prefix}label_emb.0.0.weight" in tensors:
        if _any(tensors, "conditioner.embedders.1.model.") or context == 2048:
            return "sdxl"
        is_refiner = _any(tensors, "conditioner.embedders.0.model.") or context == 1280
        what = "SDXL's refiner" if is_refiner else "Stable Diffusion 2.x unCLIP"
        raise InputError(f"{header.path} looks like {what}: {TAKEN}")
    if context is None:
        raise InputError(f"{header.path} holds a UNet without cross attention: {TAKEN}")
    linear = [tensors[k].shape for k in inside if k.endswith(".proj_in.weight")]
    openclip = any(_any(tensors, p) for p in PREFIXES["sd2"]["text_encoder"])
    return "sd2" if openclip or (linear and len(linear[0]) == 2) else "sd1"


def _other(tensors: Mapping[str, object]) -> str:
    """A description of a file without an LDM UNet."""
    if is_lora(tensors):
        return "is a LoRA, not a model: give the model, and this file as its LoRA"
    if any(k in tensors for k in ("emb_params", "clip_l", "clip_g")):
        return "is an embedding of a prompt (textual inversion), not a model"
    if any(k.startswith(("down_blocks.", "encoder.down_blocks.")) for k in tensors):
        return (
            "is one part of a diffusers folder: give the folder that has model_index.json, or the "
            "single file of the whole model"
        )
    vae = "decoder.conv_in.weight"
    if vae in tensors or f"first_stage_model.{vae}" in tensors:
        return "is a VAE without a UNet: give the model, and this file as its VAE"
    if _any(tensors, "text_model.") or _any(tensors, "transformer.resblocks."):
        return "is a text encoder without a UNet"
    return f"is not a supported model{_inferred(tensors)}"


def _inferred(tensors: Mapping[str, object]) -> str:
    """The type that diffusers infers; it infers "v1" for unknown models."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    try:
        kind = infer_diffusers_model_type(dict(tensors))
    except Exception:  # shapes that no release has; the caller's error says the rest
        kind = "v1"
    first = ", ".join(sorted(tensors)[:2])
    return f" (it begins with {first})" if kind == "v1" else f" (it looks like {kind})"
