"""The result of an attack, and the random choice of its prompts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import stream

SHOWN = 8  # images that are kept of each evaluation


class Found(NamedTuple):
    """The result of an attack.

    Attributes:
        values: the figures for attacks.json.
        said: details of how they were measured.
        tensors: "pictures ..." (n, 3, H, W) uint8, and tensors that other attacks use.
    """

    values: dict[str, Any]
    said: dict[str, Any]
    tensors: dict[str, Tensor]


def chosen(values: list, number: int, seed: int) -> list:
    """`number` of the values in random order. A value repeats only after all have been used."""
    order = torch.randperm(len(values), generator=stream(seed, 0)).tolist()
    return [values[order[i % len(order)]] for i in range(number)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
