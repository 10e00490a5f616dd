"""One or several SPM adapters in a pipeline, scaled for each prompt (facilitated transport).

The weights are W0 + sum m_i (up_i down_i), set by diffusers' set_adapters. m_i depends on how near
the prompt is to the concept that adapter i erases (ebu_optim.baselines.transport).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion import transport
from ..errors import InputError
from .families import named
from .prompts import words


class Erased(NamedTuple):
    """An adapter's name in the pipeline, and the prompt that it erases: embedding and tokens."""

    name: str
    embedding: Tensor
    tokens: set[int]


def load(pipe: Any, folders: list[Path]) -> list[Erased]:
    """Load the adapters in folders of unlearn.py into the pipeline.

    Raises:
        InputError: a folder has no adapter, or its adapter erases several prompts.
    """
    found = []
    for i, folder in enumerate(folders):
        try:
            erased = json.loads((folder / "unlearn.json").read_text())["forget"]
            pipe.load_lora_weights(
                folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=f"erased_{i}"
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"--adapters {folder} has no adapter of unlearn.py for this model: {error}"
            ) from error
        if len(erased) != 1:
            raise InputError(
                f"--adapters {folder} erases {len(erased)} prompts: transport needs exactly 1"
            )
        embedding = _embedding(pipe, erased[0])
        found.append(Erased(f"erased_{i}", embedding, words(erased[0], pipe.tokenizer)))
    return found


def strengths(pipe: Any, erased: list[Erased], prompt: str) -> list[float]:
    """The strength m of each adapter for a prompt."""
    return transport(
        _embedding(pipe, prompt),
        words(prompt, pipe.tokenizer),
        [(e.embedding, e.tokens) for e in erased],
    )


def scale(pipe: Any, erased: list[Erased], prompt: str) -> list[float]:
    """Scale the pipeline's adapters for a prompt and return the strength m of each."""
    m = strengths(pipe, erased, prompt)
    pipe.set_adapters([e.name for e in erased], m)
    return m


@torch.no_grad()
def _embedding(pipe: Any, prompt: str) -> Tensor:
    (found,) = named(type(pipe).__name__).encode(pipe, [prompt])["encoder_hidden_states"]
    return found
