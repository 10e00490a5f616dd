"""The memory that a run of each family takes, counted from the shipped configurations and from
those of released transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats.looking import TITLES
from ..formats.unpacking import shipped_folder
from ..text_to_image import memory, pipelines, prompts
from ..text_to_image.room import GIB, WAYS, ways
from . import released
from .options import Forget

LIBRARIES = GIB  # workspace of the CUDA libraries, which the count does not include
CARDS = (12, 16, 24, 48, 80)  # GB
#: The text encoders of a released transformer alone are larger than most cards. The count draws
#: images one by one and omits the report's pictures, which need the whole pipeline in memory.
LEAST: dict[str, Any] = {"sample_batch_size": 1, "evidence_images": 0, "validation_steps": 0}


def table(room: int | None) -> list[str]:
    """One line per family and way: the peak in GiB, and whether it fits into `room` bytes.

    With `room` None each line names the smallest common card that has enough memory."""
    lines = []
    for family, title in TITLES.items():
        folder = shipped_folder(family)
        for way, options in WAYS.items():
            lines.append(_line(f"{title}, {way}", counted(folder, options), room))
    for name in released.RELEASED:
        if looked := released.looked(name):
            for way, options in ways(looked.family).items():
                peak = counted(Path(name), {**options, **LEAST}, looked)
                lines.append(_line(f"{name}, {way}", peak, room))
    return lines


def _line(what: str, peak: int, room: int | None) -> str:
    peak += LIBRARIES
    card = next((f"on {n} GB" for n in CARDS if peak < n * GIB), f"on no card of {CARDS[-1]} GB")
    fits = f"  {card}" if room is None else ("  fits" if peak < room else "  does not fit")
    return f"  {what}: {peak / GIB:.1f} GiB{fits}"


def counted(folder: Path, options: dict[str, Any], looked: pipelines.Looked | None = None) -> int:
    """Bytes at the peak of a run of `ebu forget` with these options and batch 1."""
    args: Any = Forget(
        pretrained_model_name_or_path=str(folder),
        forget=["a thing"],
        output_dir=Path("out"),
        **{"mixed_precision": "no", **options},
    ).resolved()
    looked = looked or pipelines.look(args, weights=False)
    texts = prompts.collect(args, looked.tokenizer, warn=lambda line: None)
    return memory.count(args, looked, texts).peak
