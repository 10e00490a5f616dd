"""UnlearnCanvas: 51 styles by 20 objects, one of which a model fine-tuned on them is to lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from ..metrics.unlearncanvas import LARGE, OBJECTS, STYLES
from .protocol import Asked, Protocol, Sampling, Seen, not_computed, one_of

SEEDS = (188, 288, 588, 688, 888)
#: What the data set calls photographs without a style: prompts with it are no caption of the
#: training, and no style that can be kept.
NO_STYLE = "Seed_Images"
KINDS = {"style": STYLES, "object": OBJECTS}


def asked(seeds: Sequence[int], _: Mapping[str, Path]) -> list[Asked]:
    """The grid, in the published order for each seed."""
    return [
        Asked(
            f"A {thing} image in {style.replace('_', ' ')} style.", seed,
            of={"style": style, "object": thing},
        )
        for seed, style, thing in product(seeds, STYLES, OBJECTS)
    ]  # fmt: skip


def count(seen: Seen) -> dict[str, Any]:
    """UA: 1 - accuracy on the target; IRA: accuracy on the others of its kind; CRA: accuracy of the
    other kind, over all cells. Means are over classes, each of as many pictures."""
    own, cross = ("style", "object") if seen.forget[0] in STYLES else ("object", "style")

    def hit(kind: str, observed: str, asked: Asked) -> bool:
        return observed == asked.of[kind]

    def kept(asked: Asked, but: Sequence[str] = ()) -> bool:
        return asked.of["style"] != NO_STYLE and asked.of[own] not in but

    def gone(asked: Asked) -> bool:
        return asked.of[own] in seen.forget

    def of(kind: str, name: str, asked: Asked) -> bool:
        return asked.of[kind] == name

    judge = {kind: f"unlearncanvas-{kind}" for kind in KINDS}
    return {
        "ua": seen.mean(judge[own], lambda o, a: not hit(own, o, a), gone),
        "ira": seen.mean(judge[own], partial(hit, own), partial(kept, but=seen.forget)),
        "cra": seen.mean(judge[cross], partial(hit, cross), kept),
        "fid_unlearncanvas": not_computed(
            "torchvision's Inception on OpenCV's resize, against the data set, is not built in"
        ),
        **{
            f"accuracy/{name}": seen.mean(judge[kind], partial(hit, kind), partial(of, kind, name))
            for kind, names in KINDS.items() for name in names
        },
    }  # fmt: skip


def _protocol(name: str, seeds: Sequence[int]) -> Protocol:
    return Protocol(
        name=name,
        title=f"UnlearnCanvas: 51 styles x 20 objects x {len(seeds)} seeds, for each target",
        source="OPTML-Group/UnlearnCanvas@920cfd1:machine_unlearning/evaluation/"
        "{sampling_unlearned_models/uce,quantitative/accuracy}.py",
        sampling=Sampling(sampler="lms", steps=100, guidance=9.0, dtype="float16"),
        asked=partial(asked, seeds),
        images=len(STYLES) * len(OBJECTS) * len(seeds),
        judges={f"unlearncanvas-{kind}": LARGE for kind in KINDS},
        count=count,
        targets=one_of(tuple(n for n in (*STYLES, *OBJECTS) if n != NO_STYLE), "style or object"),
        saved="jpeg",
        notes=(
            "sampling is that of uce.py; the scripts of the other methods draw by CompVis's DDIM "
            "from CUDA noise that is seeded once for the whole grid",
            "uce.py keeps latents in float32 under autocast; here they are float16 after the noise",
            f"{NO_STYLE}, whose caption was never trained, is drawn and judged, and left out of "
            "IRA and CRA",
            "a table is the mean over 50 styles or 20 objects, each unlearned by itself",
        ),
    )


PROTOCOLS = (_protocol("unlearncanvas", SEEDS), _protocol("unlearncanvas-seed188", SEEDS[:1]))
