"""The world's images: scikit-learn's digits at 32x32, in styles that are deterministic functions.

Ink of shape (n, 32, 32) in [0, 1] becomes images (n, 3, 32, 32) in [-1, 1]. Every digit is rendered
in every style, so that content and style are independent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import digits
from .captions import STYLES

SIZE = 32
SHAPE = (3, SIZE, SIZE)
BLACK, WHITE = (0.08, 0.08, 0.08), (1.0, 1.0, 1.0)
#: Style -> the colours of ink and paper.
COLOURS = {
    "plain": (BLACK, WHITE),
    "outline": (BLACK, WHITE),
    "negative": (WHITE, BLACK),
    "halftone": (BLACK, WHITE),
    "red": ((0.75, 0.05, 0.1), (1.0, 0.82, 0.8)),
    "blue": ((0.1, 0.15, 0.75), (0.8, 0.87, 1.0)),
}
DOT = 4  # distance between dots of the halftone in pixels


class World(NamedTuple):
    """Images (n, 3, 32, 32) float32 in [-1, 1], and their contents (n,) and styles (n,) as
    numbers, in the order of the tables in captions.py."""

    pictures: Tensor
    contents: Tensor
    styles: Tensor


def ink(digit: Tensor) -> Tensor:
    """Strokes (n, 32, 32) in [0, 1] of digits (n, 1, 8, 8) in [-1, 1], see digits.images."""
    return _strokes(_enlarged(digit))


def draw(digit: Tensor, style: str) -> Tensor:
    """Digits (n, 1, 8, 8) in [-1, 1] as images (n, 3, 32, 32) in [-1, 1].

    Raises:
        ValueError: there is no such style.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}; got {style!r}")
    soft = _enlarged(digit)
    strokes = _strokes(soft)
    if style == "outline":
        wide = F.max_pool2d(strokes[:, None], 3, 1, 1)[:, 0]
        narrow = -F.max_pool2d(-strokes[:, None], 3, 1, 1)[:, 0]
        strokes = wide - narrow
    if style == "halftone":
        # dots that grow with the grey of the digit, as in a printer's halftone screen
        strokes = ((soft - _screen()) * 4 + 0.5).clamp(0, 1)
    front, back = (torch.tensor(c).view(3, 1, 1) for c in COLOURS[style])
    return (back + (front - back) * strokes[:, None]) * 2 - 1


def paper(style: str, n: int) -> Tensor:
    """Images (n, 3, 32, 32) of the style without a digit."""
    return draw(-torch.ones(n, *digits.SHAPE), style)


def world(split: str, most: int | None = None) -> World:
    """Every digit of the split, "train" (1437) or "test" (360), in every style.

    Args:
        most: only the first `most` digits; None: all.

    Raises:
        ValueError: there is no such split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test"; got {split!r}')
    x, y, x_test, y_test = digits.images()
    x, y = (x, y) if split == "train" else (x_test, y_test)
    x, y = x[:most], y[:most]
    return World(
        torch.cat([draw(x, style) for style in STYLES]),
        y.repeat(len(STYLES)),
        torch.arange(len(STYLES)).repeat_interleave(len(y)),
    )


def readability(style: str) -> float:
    """How well a digit can be read in this style, without a trained model.

    It is the share of test digits whose nearest training image in the style, at 16x16 in grey,
    shows the same digit."""
    x, y, x_test, y_test = digits.images()
    seen, asked = (
        F.avg_pool2d(draw(part, style).mean(1, keepdim=True), 2).flatten(1) for part in (x, x_test)
    )
    return (y[torch.cdist(asked, seen).argmin(1)] == y_test).float().mean().item()


def _enlarged(digit: Tensor) -> Tensor:
    if digit.dim() != 4 or tuple(digit.shape[1:]) != digits.SHAPE:
        raise ValueError(f"digits must have shape (n, 1, 8, 8); got {tuple(digit.shape)}")
    large = F.interpolate(digit, (SIZE, SIZE), mode="bicubic", align_corners=False)
    return large[:, 0].add(1).div(2).clamp(0, 1)


def _strokes(soft: Tensor) -> Tensor:
    return ((soft - 0.3) / 0.3).clamp(0, 1)


def _screen() -> Tensor:
    """Thresholds (32, 32) in [0.1, 0.9], lowest in the middle of each dot."""
    wave = torch.cos((torch.arange(SIZE) - (DOT - 1) / 2) * 2 * math.pi / DOT)
    return 0.5 - 0.2 * (wave[:, None] + wave[None, :])
