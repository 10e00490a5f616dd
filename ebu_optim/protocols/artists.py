"""Artists, erased ones and others: by LPIPS, the distance of a model from its base, as in ESD, and
by CLIP, as in MACE."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text_to_image.prompt_files import table
from .coco import CLIP, WEIGHTS
from .coco import JUDGE as BY_CLIP
from .protocol import LISTS, Asked, Protocol, Sampling, Seen, anything, one_of

JUDGE = "lpips-alex"
ALEXNET = "7be5be79"
BIG = ("Pablo Picasso", "Van Gogh", "Rembrandt", "Andy Warhol", "Caravaggio")
ERASED, KEPT = "0", "1"
MACE = "prompts_csv/art_100_concepts.csv of https://github.com/Shilin-LU/MACE"
NICHE = ("Tyler Edlin", "Thomas Kinkade", "Kilian Eng", "Kelly McKernan", "Ajin: Demi Human")


def count(seen: Seen) -> dict[str, Any]:
    """LPIPS_e on the erased artists, LPIPS_u on the others, and LPIPS_d, their difference."""

    def gone(asked: Asked) -> bool:
        return asked.of["artist"] in seen.forget

    erased = seen.mean(JUDGE, lambda d, _: d, gone)
    others = seen.mean(JUDGE, lambda d, _: d, lambda a: not gone(a))
    return {"lpips_e": erased, "lpips_u": others, "lpips_d": _difference(erased, others)}


def count_mace(seen: Seen) -> dict[str, Any]:
    """CLIP_e on the erased artists, CLIP_s on the others, and H_a, CLIP_s less CLIP_e."""

    def mean(kind: str) -> Any:
        return seen.mean(BY_CLIP, lambda c, _: 100 * c, lambda a: a.of["type"] == kind)

    erased, others = mean(ERASED), mean(KEPT)
    return {"clip_e": erased, "clip_s": others, "h_a": _difference(others, erased)}


def _difference(a: Any, b: Any) -> Any:
    """a - b of two figures, or the reason why one of them is not computed."""
    lacking = [f for f in (a, b) if "value" not in f]
    return lacking[0] if lacking else a["value"] - b["value"]


def asked(file: str, first: int | None, _: Mapping[str, Path]) -> list[Asked]:
    """The first `first` prompts of each artist; None: all 20."""
    found: dict[str, list[Asked]] = {}
    for row, cells in table(str(LISTS / f"{file}.csv"), "the list"):
        artist = str(cells["artist"])
        found.setdefault(artist, []).append(Asked(row.prompt, row.seed or 0, of={"artist": artist}))
    return [one for several in found.values() for one in several[:first]]


def asked_mace(once: bool, files: Mapping[str, Path]) -> list[Asked]:
    """The rows of MACE's list; with `once`, the first of each prompt."""
    file, found = files["artists_mace"], []
    for row, cells in table(str(file), "--files artists_mace"):
        kind, artist = (str(cells.get(name, "")).strip() for name in ("type", "artist"))
        if kind not in (ERASED, KEPT):
            raise InputError(
                f"--files artists_mace={file}: the column 'type' must be {ERASED} (erased) or "
                f"{KEPT} (kept) in each row; got {kind!r} for {row.prompt!r}: give {MACE}"
            )
        found.append(Asked(row.prompt, row.seed or 0, of={"artist": artist, "type": kind}))
    return list({a.prompt: a for a in reversed(found)}.values())[::-1] if once else found


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
            "both images are resized to 64 pixels, as ESD's script does",
            "ESD's code of today samples 20 steps in bfloat16 from CUDA noise",
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
PROTOCOLS += tuple(
    Protocol(
        name=name,
        title=f"100 erased artists and 100 others, {images:,} images, by CLIP",
        source="Shilin-LU/MACE@057e7a6:metrics/evaluate_clip_score.py",
        sampling=Sampling(sampler="ddim", steps=50),
        asked=partial(asked_mace, once),
        needs={"artists_mace": MACE},
        images=images,
        judges={BY_CLIP: CLIP},
        count=count_mace,
        targets=anything,
        alone=False,
        notes=(WEIGHTS, "which artists are erased is in the list, whatever --forget names"),
    )
    for name, images, once in (("artists-mace", 5000, False), ("artists-mace-1000", 1000, True))
)
