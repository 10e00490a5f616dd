"""Images from a whole pipeline, each from its own starting noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import replacing
from .families import named


def ready(pipe: Any, dtype: torch.dtype = torch.float32, scheduler: Any = None) -> Any:
    """Move the pipeline to the GPU, if there is one, and set its scheduler.

    Args:
        scheduler: None takes the family's sampler, for Stable Diffusion DDIM without clipping.
    """
    pipe.scheduler = scheduler or named(type(pipe).__name__).sampler(pipe.scheduler)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device, dtype)  # diffusers' own `to` logs a warning for each part
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch: int,
    noise: Callable[[int], Tensor] | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield an image (3, H, W) float32 in [0, 1] on the CPU for each prompt, batch by batch.

    Args:
        seeds: one seed per image for its noise, which does not depend on the other images.
        noise: index of an image -> its noise (1, C, h, w); None: the pipeline samples the noise
            with a generator on the CPU.
        options: arguments of the pipeline: num_inference_steps, guidance_scale, ...
    """
    for i in tqdm(range(0, len(texts), batch), "generating"):
        if noise is not None:
            rows = range(i, min(i + batch, len(texts)))
            options["latents"] = torch.cat([noise(k) for k in rows])
        yield from together(pipe, texts[i : i + batch], seeds[i : i + batch], **options)


@torch.no_grad()
def together(
    pipe: Any, texts: Sequence[str], seeds: Sequence[int | torch.Generator], **options: Any
) -> Tensor:
    """Images (n, 3, H, W) float32 in [0, 1] on the CPU, from one call of the pipeline.

    Args:
        seeds: for each image the seed of a generator on the CPU, or a generator.
    """
    if "negative_prompt" in options:  # some pipelines need one per prompt
        options["negative_prompt"] = [options["negative_prompt"]] * len(texts)
    sources = [torch.Generator().manual_seed(s) if isinstance(s, int) else s for s in seeds]
    x = pipe(prompt=list(texts), generator=sources, output_type="pt", **options).images
    return x.float().cpu()


def save(x: Tensor, file: Path, whose: str, remedy: str, said: Mapping[str, str] = {}) -> None:
    """Save an image (3, H, W) in [0, 1] as an 8-bit PNG file.

    Args:
        whose: the model that generated it, for the message.
        remedy: the end of the message.
        said: texts to store in the file, by name.

    Raises:
        InputError: the image has NaN or Inf. In 8 bits it would be black and look forgotten.
    """
    if not x.isfinite().all():
        raise InputError(f"{whose} generates NaN: its weights have diverged{remedy}")
    pixels = x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    texts = PngImagePlugin.PngInfo()
    for name, text in said.items():
        texts.add_itxt(name, text)
    with replacing(file) as work:
        Image.fromarray(pixels.contiguous().numpy()).save(work, pnginfo=texts)
