"""The denoiser's conditions for all prompts, computed once and kept in --sets_dir."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import load_tensors, save_tensors
from ..manifest import key
from .families import Conditions, Family
from .pipelines import Looked, load, parts


@contextmanager
def in_one_line() -> Iterator[None]:
    """Turns a ValueError about a set, such as NaN in it, into an InputError of one line."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


@in_one_line()
def conditions(
    args: Any, looked: Looked, folder: Path, texts: list[str], device: Any
) -> Conditions:
    """The conditions of all prompts.

    The text encoders are freed afterwards, and so is the VAE where a shared condition needs it.

    Raises:
        InputError: NaN or Inf in the conditions.
    """
    family, found = looked.family, parts(folder, args.variant)
    of = [found[part] for pair in family.encoders.items() for part in pair]
    of += [found["settings"]] if family.settings else []
    of += ["bf16"] if halved(args, family) else []
    path = args.sets_dir / f"text-{key(texts, *of)}.safetensors"
    if not path.exists():
        save_tensors(path, _read(args, looked, folder, texts, device), {})
    kept = load_tensors(path)[0]
    kept["encoder_hidden_states"] = kept.pop("embeddings")
    shapes = family.shapes(looked.unet, looked.tokenizer.model_max_length)
    shared = family.told(looked.unet, args.guidance_scale) | family.shared(
        looked.resolution, lambda pixels: to_latents(args, looked, folder, pixels, device)
    )
    return Conditions({name: kept[name] for name in shapes}, shared)


def halved(args: Any, family: Family) -> bool:
    """Whether the text encoders run in bfloat16."""
    return args.mixed_precision in ("fp16", "bf16") and not family.wide


def _read(args: Any, looked: Looked, folder: Path, texts: list[str], device: Any) -> Any:
    """The conditions of `texts` by their names in a file; frees the text encoders afterwards."""
    family, parts_of = looked.family, dict(looked.tokenizers)
    for part in family.encoders:
        read = load(family.kind(part), folder / part, args.variant)
        if halved(args, family):
            read = nn.Module.to(read, torch.bfloat16)
        parts_of[part] = read.to(device)
    with torch.no_grad():
        found = family.encode(family.reader(folder, args.variant, parts_of), texts)
    return {"embeddings": found.pop("encoder_hidden_states"), **found}


def to_latents(args: Any, looked: Looked, folder: Path, pixels: Tensor, device: Any) -> Tensor:
    """Latents (n, C, h, w) of images (n, 3, H, W) in [-1, 1]; frees the VAE afterwards."""
    vae = load(looked.family.kind("vae"), folder / "vae", args.variant).to(device)
    # always in float32, as the name of the cache file does not include --mixed_precision
    with torch.autocast(torch.device(device).type, enabled=False):
        return looked.family.to_latents(vae, pixels)
