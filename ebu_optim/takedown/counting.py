"""Counts the peaks of :mod:`ebu_optim.takedown.fitting`, on the shipped configurations and on those
of released transformers; no weights are read.

``python -m ebu_optim.takedown.counting`` writes peaks.json again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..files import replacing
from ..formats.looking import TITLES
from ..formats.unpacking import shipped_folder
from ..text_to_image import memory, pipelines, prompts
from ..text_to_image.room import WAYS, ways
from . import released
from .fitting import FILE
from .options import Forget

#: The text encoders of a released transformer alone are larger than most cards. The count assumes
#: that images are generated one by one, and omits the report's, which need the whole pipeline.
LEAST: dict[str, Any] = {"sample_batch_size": 1, "evidence_images": 0, "validation_steps": 0}


def cases() -> Iterator[tuple[str, Callable[[], int]]]:
    """Every line of the table: what it says, and the function that counts its peak in bytes."""
    for family, title in TITLES.items():
        folder = shipped_folder(family)
        for way, options in WAYS.items():
            yield f"{title}, {way}", partial(counted, folder, options)
    for name in released.RELEASED:
        if looked := released.looked(name):
            for way, options in ways(looked.family).items():
                given = {**options, **LEAST}
                yield f"{name}, {way}", partial(counted, Path(name), given, looked)


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


if __name__ == "__main__":
    made = {what: count() for what, count in cases()}
    with replacing(FILE) as temporary:
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
