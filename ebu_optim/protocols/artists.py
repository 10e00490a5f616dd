"""Artists by LPIPS: the distance of a model from its base, on erased artists and on others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..text_to_image.prompt_files import table
from .protocol import LISTS, Asked, Protocol, Sampling, Seen, one_of

JUDGE = "lpips-alex"
ALEXNET = "7be5be79"
BIG = ("Pablo Picasso", "Van Gogh", "Rembrandt", "Andy Warhol", "Caravaggio")
NICHE = ("Tyler Edlin", "Thomas Kinkade", "Kilian Eng", "Kelly McKernan", "Ajin: Demi Human")


def count(seen: Seen) -> dict[str, Any]:
    """LPIPS_e on the erased artists, LPIPS_u on the others, and LPIPS_d, their difference."""

    def gone(asked: Asked) -> bool:
        return asked.of["artist"] in seen.forget

    erased = seen.mean(JUDGE, lambda d, _: d, gone)
    others = seen.mean(JUDGE, lambda d, _: d, lambda a: not gone(a))
    there = "value" in erased and "value" in others
    apart = (
        erased["value"] - others["value"]
        if there
        else next(f for f in (erased, others) if "value" not in f)
    )
    return {"lpips_e": erased, "lpips_u": others, "lpips_d": apart}


def asked(file: str, first: int | None, _: Mapping[str, Path]) -> list[Asked]:
    """The first `first` prompts of each artist; None: all 20."""
    found: dict[str, list[Asked]] = {}
    for row, cells in table(str(LISTS / f"{file}.csv"), "the list"):
        artist = str(cells["artist"])
        found.setdefault(artist, []).append(Asked(row.prompt, row.seed or 0, of={"artist": artist}))
    return [one for several in found.values() for one in several[:first]]


def _protocol(name: str, file: str, artists: tuple[str, ...], first: int | None) -> Protocol:
    n = first or 20
    return Protocol(
        name=name,
        title=f"five artists, {n} prompts of each, by LPIPS against the base",
        source="rohitgandikota/erasing@25613d2:evalscripts/lpips_eval.py",
        sampling=Sampling(sampler="lms", steps=100),
        asked=partial(asked, file, first),
        images=n * len(artists),
        judges={JUDGE: ALEXNET},
        count=count,
        targets=one_of(artists, "artist of the list"),
        notes=(
            "both pictures are brought to 64 pixels, as ESD's script does",
            "ESD's code of today draws 20 steps in bfloat16 from CUDA noise",
            "LPIPS_d = LPIPS_e - LPIPS_u is not in published code",
        ),
    )


_FILES = {
    "artists": ("esd_big_artist_prompts", BIG),
    "artists-niche": ("esd_short_niche_art_prompts", NICHE),
}
PROTOCOLS = tuple(
    _protocol(f"{name}{end}", file, who, first)
    for name, (file, who) in _FILES.items()
    for end, first in (("", None), ("-25", 5))
)
