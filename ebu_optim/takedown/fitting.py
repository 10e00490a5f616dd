"""How much memory a run of each family takes, counted on the shipped configurations, and on those
of released transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..formats.looking import TITLES
from ..formats.unpacking import shipped_folder
from ..text_to_image import memory, pipelines, prompts
from ..text_to_image.room import GIB, WAYS, ways
from . import released
from .options import Forget

LIBRARIES = GIB  # their workspace, which no count sees
CARDS = (12, 16, 24, 48, 80)  # GB
#: A released transformer's text encoders alone are larger than most cards: drawn one by one, and
#: without the report's pictures, for which the whole pipeline is there.
LEAST: dict[str, Any] = {"sample_batch_size": 1, "evidence_images": 0, "validation_steps": 0}


def table(room: int | None) -> list[str]:
    """A line for each family and way: the peak in GiB, and whether it fits into `room` bytes."""
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
