"""How much memory a run of each family takes, counted on the shipped configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats.looking import TITLES
from ..formats.unpacking import shipped_folder
from ..text_to_image import memory, pipelines, prompts
from ..text_to_image.room import GIB, WAYS
from .options import Forget

LIBRARIES = GIB  # their workspace, which no count sees


def table(room: int | None) -> list[str]:
    """A line for each family and way: the peak in GiB, and whether it fits into `room` bytes."""
    lines = []
    for family, title in TITLES.items():
        folder = shipped_folder(family)
        for way, options in WAYS.items():
            peak = counted(folder, options) + LIBRARIES
            fits = "" if room is None else ("  fits" if peak < room else "  does not fit")
            lines.append(f"  {title}, {way}: {peak / GIB:.1f} GiB{fits}")
    return lines


def counted(folder: Path, options: dict[str, Any]) -> int:
    """Bytes at the peak of a run of `ebu forget` with these options and batch 1."""
    args: Any = Forget(
        pretrained_model_name_or_path=str(folder), forget=["a thing"], output_dir=Path("out"),
        **{"mixed_precision": "no", **options},
    ).resolved()  # fmt: skip
    looked = pipelines.look(args, weights=False)
    texts = prompts.collect(args, looked.tokenizer, warn=lambda line: None)
    return memory.count(args, looked, texts).peak
