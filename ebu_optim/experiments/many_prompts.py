"""Ten pairs of a digit and a style of the world of digits in styles, and their prompts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..worlds.styled_digits.captions import CONTENTS, TRAINED, Caption, captions
from .text_prompts import REMEMBERED

Pair = tuple[str, str]
#: Every digit once, and every style twice; named before anything was run.
PAIRS: tuple[Pair, ...] = (
    ("zero", "outline"),
    ("one", "negative"),
    ("two", "halftone"),
    ("three", "red"),
    ("four", "blue"),
    ("five", "outline"),
    ("six", "negative"),
    ("seven", "halftone"),
    ("eight", "red"),
    ("nine", "blue"),
)
#: Ten others, which no table reports: for choosing the numbers of closed forms.
TRIAL: tuple[Pair, ...] = (
    ("zero", "red"),
    ("one", "halftone"),
    ("two", "outline"),
    ("three", "blue"),
    ("four", "negative"),
    ("five", "halftone"),
    ("six", "red"),
    ("seven", "blue"),
    ("eight", "outline"),
    ("nine", "negative"),
)
LISTS = {"reported": PAIRS, "trial": TRIAL}


def named(pair: Pair) -> list[Caption]:
    """The trained prompts that name the pair by its first words."""
    return [c for c in captions(TRAINED) if (c.content_word, c.style_word) == pair]


def wordings(pairs: Iterable[Pair]) -> list[str]:
    return [c.text for pair in pairs for c in named(pair)]


def becomes(pair: Pair) -> Pair:
    """The next digit in the same style. It is no pair of the list."""
    names = list(CONTENTS)
    return names[(names.index(pair[0]) + 1) % len(names)], pair[1]


def templates(pair: Pair) -> list[str]:
    """The pair's prompts with a place for the digit, for relearning."""
    return [re.sub(rf"\b{pair[0]}\b", "{}", text) for text in wordings([pair])]


def remembered(gone: Sequence[Pair], near: bool = False) -> list[str]:
    g = random.Random(0)  # noqa: S311
    kept = [c for c in captions(TRAINED) if (c.content, c.style) not in gone]
    if not near:
        return g.sample([c.text for c in kept], REMEMBERED)
    of: dict[Any, list[str]] = {}
    for c in kept:
        if c.content is not None:
            of.setdefault((c.content, c.style), []).append(c.text)
    return [text for texts in of.values() for text in g.sample(texts, 2)]
