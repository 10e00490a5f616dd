"""UnlearnCanvas: a model that knows a grid of styles and objects shall forget one of them.

The published grid has 51 styles and 20 objects, for a fine-tuned Stable Diffusion. That in the
world of digits in styles has 6 styles and 10 objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..metrics.unlearncanvas import LARGE, OBJECTS, STYLES
from ..worlds.styled_digits import captions as digits
from .canvas_fid import GOOGLE
from .protocol import Asked, Protocol, Sampling, Seen, not_computed, one_of

SEEDS = (188, 288, 588, 688, 888)
#: The data set's name for photographs without a style. No caption of the training has it, so that
#: it is not a style that can be kept.
NO_STYLE = "Seed_Images"


class Canvas(NamedTuple):
    """A grid of styles and objects.

    Attributes:
        styles, objects: their names.
        prompt: (style, object) -> the prompt.
        judge: the start of the judges' names, which end in "style" or "object".
        no_style: a style that is generated and judged, but does not count and is not a target.
        untold: a style that is not a target, as every prompt without a style asks for it.
    """

    styles: Sequence[str]
    objects: Sequence[str]
    prompt: Callable[[str, str], str]
    judge: str
    no_style: str = ""
    untold: str = ""

    def kind(self, forget: Sequence[str]) -> str:
        return "style" if forget[0] in self.styles else "object"

    def targets(self) -> list[str]:
        return [n for n in (*self.styles, *self.objects) if n not in (self.no_style, self.untold)]


def _published(style: str, thing: str) -> str:
    return f"A {thing} image in {style.replace('_', ' ')} style."


def _of_digits(style: str, thing: str) -> str:
    """One of the captions of the world's training, like the published prompt."""
    return f"a picture of {thing} in {style} style"


CANVAS = Canvas(STYLES, OBJECTS, _published, "unlearncanvas", no_style=NO_STYLE)
DIGITS = Canvas(
    tuple(digits.STYLES), tuple(digits.CONTENTS), _of_digits, "digits", untold=digits.UNNAMED
)


def asked(canvas: Canvas, seeds: Sequence[int], _: Mapping[str, Path]) -> list[Asked]:
    """The grid, in the published order for each seed."""
    return [
        Asked(canvas.prompt(style, thing), seed, of={"style": style, "object": thing})
        for seed, style, thing in product(seeds, canvas.styles, canvas.objects)
    ]


def count(canvas: Canvas, more: Mapping[str, Any], seen: Seen) -> dict[str, Any]:
    """UA: 1 - accuracy on the target; IRA: accuracy on the others of its kind; CRA: accuracy of the
    other kind, over all cells.

    All classes have the same number of images, so that these are means over classes."""
    own = canvas.kind(seen.forget)
    cross = "object" if own == "style" else "style"

    def hit(kind: str, observed: str, asked: Asked) -> bool:
        return observed == asked.of[kind]

    def kept(asked: Asked, but: Sequence[str] = ()) -> bool:
        return asked.of["style"] != canvas.no_style and asked.of[own] not in but

    def gone(asked: Asked) -> bool:
        return asked.of[own] in seen.forget

    def of(kind: str, name: str, asked: Asked) -> bool:
        return asked.of[kind] == name

    kinds = {"style": canvas.styles, "object": canvas.objects}
    judge = {kind: f"{canvas.judge}-{kind}" for kind in kinds}
    return {
        "ua": seen.mean(judge[own], lambda o, a: not hit(own, o, a), gone),
        "ira": seen.mean(judge[own], partial(hit, own), partial(kept, but=seen.forget)),
        "cra": seen.mean(judge[cross], partial(hit, cross), kept),
        **more,
        **{
            f"accuracy/{name}": seen.mean(judge[kind], partial(hit, kind), partial(of, kind, name))
            for kind, names in kinds.items()
            for name in names
        },
    }


FID = "fid-unlearncanvas"


def count_published(fid: bool, seen: Seen) -> dict[str, Any]:
    """`count`, and the FID of what is not forgotten; published code has it of all five seeds."""
    few = not_computed("a fifth of the images does not carry a FID")
    figure = seen.figure(FID, lambda found: found[0]) if fid else few
    return count(CANVAS, {"fid_unlearncanvas": figure}, seen)


def _protocol(name: str, seeds: Sequence[int]) -> Protocol:
    whole = tuple(seeds) == SEEDS
    return Protocol(
        name=name,
        title=f"UnlearnCanvas: 51 styles x 20 objects x {len(seeds)} seeds, for each target",
        source="OPTML-Group/UnlearnCanvas@920cfd1:machine_unlearning/evaluation/"
        "{sampling_unlearned_models/uce,quantitative/accuracy,quantitative/fid}.py",
        sampling=Sampling(sampler="lms", steps=100, guidance=9.0, dtype="float16"),
        asked=partial(asked, CANVAS, seeds),
        images=len(STYLES) * len(OBJECTS) * len(seeds),
        judges={f"unlearncanvas-{kind}": LARGE for kind in ("style", "object")}
        | ({FID: f"{GOOGLE} n=5100 "} if whole else {}),
        count=partial(count_published, whole),
        targets=one_of(CANVAS.targets(), "style or object"),
        saved="jpeg",
        kind=CANVAS.kind,
        notes=(
            "sampling is that of uce.py; the scripts of the other methods sample by CompVis's DDIM "
            "from CUDA noise that is seeded once for the whole grid",
            "uce.py keeps latents in float32 under autocast; here they are float16 after the noise",
            f"{NO_STYLE}, whose caption was never trained, is generated and judged, and left out "
            "of IRA and CRA, but not of FID",
            "a table is the mean over 50 styles or 20 objects, each unlearned by itself",
        ),
    )


def _digits(name: str, seeds: Sequence[int]) -> Protocol:
    return Protocol(
        name=name,
        title=f"UnlearnCanvas in small: 6 styles x 10 digits x {len(seeds)} seeds of the world of "
        "digits in styles, for each target",
        source="unlearncanvas@protocols/unlearncanvas.py, in ebu_optim.worlds.styled_digits",
        sampling=Sampling(sampler="ddim", steps=20, guidance=3.0, size=32),
        asked=partial(asked, DIGITS, seeds),
        needs={
            "digits-judges": "the judges of that world: the folder that "
            "examples/stable_diffusion/world/judges.py makes"
        },
        images=len(DIGITS.styles) * len(DIGITS.objects) * len(seeds),
        judges={f"digits-{kind}": "" for kind in ("style", "object")},
        count=partial(count, DIGITS, {}),
        targets=one_of(DIGITS.targets(), "digit, or style that a prompt must name"),
        kind=DIGITS.kind,
        notes=(
            f"{DIGITS.untold}, which every prompt without a style asks for, counts among the kept "
            "and is no target",
            "a table is the mean over 5 styles or 10 digits, each unlearned by itself",
        ),
    )


PROTOCOLS = (
    _protocol("unlearncanvas", SEEDS),
    _protocol("unlearncanvas-seed188", SEEDS[:1]),
    _digits("unlearncanvas-digits", SEEDS),
    _digits("unlearncanvas-digits-seed188", SEEDS[:1]),
)
