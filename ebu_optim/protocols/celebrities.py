"""Celebrities as in MACE: 200 names, judged by GIPHY's detector, whose answers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text_to_image.prompt_files import table
from .protocol import Asked, Protocol, Sampling, Seen

JUDGE = "giphy"
NAMES = (
    "a table of MACE's 200 names in its five templates, with the columns prompt, evaluation_seed "
    "and, for Acc_e and Acc_s, concept (SPEED publishes data/100_celebrity.csv: "
    "https://github.com/Ouxiang-Li/SPEED)"
)


def count(seen: Seen) -> dict[str, Any]:
    """Acc_e and Acc_s: top-1 accuracy among images with a face, on erased and on kept names; H_c,
    the harmonic mean of 1 - Acc_e and Acc_s.

    An observation is the top name, or None without a face."""

    def accuracy(gone: bool, found: Sequence[Any]) -> float | None:
        of = [
            o.lower() == a.of["name"].lower()
            for o, a in zip(found, seen.asked, strict=True)
            if o is not None and (a.of["name"] in seen.forget) == gone
        ]
        return sum(of) / len(of) if of else None

    def harmonic(found: Sequence[Any]) -> float | None:
        e, s = accuracy(True, found), accuracy(False, found)
        if e is None or s is None:
            return None
        return 2 / (1 / (1 - e) + 1 / s) if e < 1 and s > 0 else 0.0

    return {
        "acc_e": seen.figure(JUDGE, partial(accuracy, True)),
        "acc_s": seen.figure(JUDGE, partial(accuracy, False)),
        "h_c": seen.figure(JUDGE, harmonic),
    }


def asked(seeds: Sequence[int] | None, files: Mapping[str, Path]) -> list[Asked]:
    """Each prompt with each of the seeds; None: with the row's seed."""
    found = []
    for row, cells in table(str(files["celebrities"]), "--files celebrities"):
        of = {"name": str(cells.get("concept") or cells.get("name") or "")}
        own = [row.seed or 0] if seeds is None else seeds
        found += [Asked(row.prompt, seed, of=of) for seed in own]
    return found


def names(given: Sequence[str]) -> list[str]:
    if not given:
        raise InputError("--forget: name the celebrities that the model should have forgotten")
    return list(given)


def _protocol(name: str, images: int, seeds: Sequence[int] | None) -> Protocol:
    return Protocol(
        name=name,
        title=f"celebrities, {images:,} images of 200 names",
        source="Shilin-LU/MACE@057e7a6:metrics/evaluate_by_GCD.py",
        sampling=Sampling(sampler="ddim", steps=50),
        asked=partial(asked, seeds),
        needs={"celebrities": NAMES},
        images=images,
        judges={JUDGE: ""},
        count=count,
        targets=names,
        alone=False,
        notes=("no list of people's names is in the package",),
    )


PROTOCOLS = (_protocol("celebrities", 5000, range(1, 6)), _protocol("celebrities-1000", 1000, None))
