"""What an attack finds, and what is drawn at random for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import stream

SHOWN = 8  # pictures of each look that are kept


class Found(NamedTuple):
    """Attributes:
    values: of attacks.json.
    said: how they came about.
    tensors: "pictures ..." (n, 3, H, W) uint8, and what others go on with.
    """

    values: dict[str, Any]
    said: dict[str, Any]
    tensors: dict[str, Tensor]


def chosen(values: list, number: int, seed: int) -> list:
    """So many of them in a random order, each again only when all have had their turn."""
    order = torch.randperm(len(values), generator=stream(seed, 0)).tolist()
    return [values[order[i % len(order)]] for i in range(number)]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
