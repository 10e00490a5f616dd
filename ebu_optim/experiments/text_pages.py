"""Parts of the report of a text-to-image table: notes, curves, images, a typical run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..baselines import methods
from ..errors import InputError
from ..metrics.images import read_image
from ..report import comparison
from . import rows, text_results
from .runs import Run
from .tables import Row, gather
from .text_worlds import EVALUATE, TRAIN, UNLEARN, TextSetting

MOST = 10  # prompts in a grid


def typical(found: Sequence[Row]) -> dict[str, Any]:
    """unlearn.json of a typical run, for the part of the protocol that most rows share.

    It is the first run with the surrogate's losses, or else the first run that unlearns.

    Raises:
        InputError: there is no such run.
    """
    runs = [r.runs[0] for r in found if r.runs[0].tasks[0].maker == UNLEARN]
    made = [text_results.read(run, UNLEARN) for run in runs]
    if not made:
        raise InputError("--methods retrain: give a method that unlearns, too")
    plain = [m for m in made if methods[m["method"]].forgets == "surrogate"]
    return (plain or made)[0]


def apart(setting: TextSetting, found: Sequence[Row]) -> list[str]:
    """A note if Retrain's autoencoder or text encoder differs from the base's.

    This happens with a --base that was trained in another way, or with another number of
    threads."""

    def weights(pipeline: Path, part: str) -> list[bytes]:
        return [f.read_bytes() for f in sorted((pipeline / part).glob("*.safetensors"))]

    made = [r.runs[0].tasks[0] for r in found]
    other = [
        part
        for part in ("vae", "text_encoder")
        for t in made
        if t.maker == TRAIN
        and weights(t.folder / "pipeline", part) != weights(setting.base.folder, part)
    ]
    note = (
        f"Retrain has another {' and another '.join(other)} than the base: inversion and "
        "relearning learn from the base's latents, and say nothing of it."
    )
    return [note] if other else []


def marks(found: Sequence[Row]) -> list[str]:
    """A note that names the rows with P_f <= 0.05 and a loss of at most 0.02 on every other
    concept."""
    there = []
    for r in found:
        v = gather(r)
        p_f, drop = (comparison.value(v[k]) for k in ("p_f", "worst_drop"))
        if p_f is None or drop is None:
            continue
        off = 1e-9  # rounding errors in means of shares
        if p_f <= 0.05 + off and drop <= 0.02 + off:
            there.append(r.name)
    return [
        f"P_f <= 0.05 and no other content or style more than 0.02 below the base, in the "
        f"mean over seeds: {', '.join(there) or 'no row'}."
    ]


def plots(found: Sequence[Row]) -> list[dict[str, Any]]:
    """P_f over the steps of textual inversion."""
    series = {}
    for r in found:
        v = rows.results(r.runs[0].folder)[-1]["values"]
        points = [
            (n, comparison.value(v.get(key)))
            for n, key in ((0, "p_f_prompts"), (100, "inversion_100"), (200, "inversion_200"))
        ]
        series[r.name] = [(x, y) for x, y in points if y is not None]
    if all(len(points) < 2 for points in series.values()):
        return []
    label = "P_f after steps of textual inversion"
    return [{"title": label, "x": "steps", "y": label, "series": series}]


def grid(
    found: Sequence[Row], drawn: Sequence[Run], forgotten: Sequence[str], each: int = 100
) -> dict[str, Any]:
    """A grid with prompts as rows and methods as columns, `each` images per cell.

    All columns start from the same noise."""
    names = ["base model", *(r.name for r in found)]
    shown = [shown_in(run, each) for run in drawn]
    texts = list(shown[0])
    return {
        "title": "images of every method, from the same noise",
        "rows": texts,
        "columns": {
            n: torch.stack([s[t] for t in texts]) for n, s in zip(names, shown, strict=True)
        },
        "forgotten": [t for t in texts if any(f" {f} " in f" {t} " for f in forgotten)],
    }


def shown_in(run: Run, each: int) -> dict[str, Tensor]:
    """Prompt -> its first images (n, 3, H, W) uint8, for at most ten prompts."""
    t = next(t for t in run.tasks if t.maker == EVALUATE)
    files: dict[str, list[Path]] = {}
    for file, prompt in text_results.left(t)["images"].items():
        files.setdefault(prompt, []).append(t.folder / "images" / file)
    return {
        prompt: torch.stack([read_image(f) for f in files[prompt][:each]])
        for prompt in list(files)[:MOST]
    }
