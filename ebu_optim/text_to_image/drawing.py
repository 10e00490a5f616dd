"""Pictures of a whole pipeline, each from its own starting noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .families import named


def ready(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline on the GPU, where there is one, with a DDIM sampler that clips nothing."""
    pipe.scheduler = named(type(pipe).__name__).sampler(pipe.scheduler)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device, dtype)  # diffusers' own `to` logs a warning for each
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any, texts: Sequence[str], seeds: Sequence[int], *, batch: int, **options: Any
) -> Iterator[Tensor]:
    """A picture (3, H, W) float32 in [0, 1] on the CPU for each prompt, one batch after the other.

    Args:
        seeds: of each picture's noise: whatever else is drawn, it stays the same.
        options: of the pipeline: num_inference_steps, guidance_scale, ...
    """
    for i in tqdm(range(0, len(texts), batch), "drawing"):
        noise = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        with torch.no_grad():
            x = pipe(
                prompt=list(texts[i : i + batch]), generator=noise, output_type="pt", **options
            ).images
        yield from x.float().cpu()
