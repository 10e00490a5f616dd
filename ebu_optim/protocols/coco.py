"""How much is kept in general: COCO's captions, judged by CLIP and by FID against COCO's images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..text_to_image.prompt_files import table
from .i2p import picture
from .protocol import Asked, Protocol, Sampling, Seen, anything

JUDGE = "clip"
CLIP = "ViT-B-32-quickgelu openai"
LARGE = "clip-large"
COCO_10K = (
    "coco_10k.csv, data/prompts of https://github.com/OPTML-Group/AdvUnlearn (CC-BY-4.0; the copy "
    "in Diffusion-MU-Attack lacks 31 rows)"
)
WEIGHTS = "OpenAI's weights by open_clip, published code has them by transformers"
#: FID -> start of its identity: the weights, and the number of real images where it is published.
FIDS = {"fid-text2image": "6726825d n=10000 ", "fid-clean": "6726825d "}
COCO_30K = "coco_30k.csv, data of https://github.com/rohitgandikota/unified-concept-editing"


def count(fid: str | None, seen: Seen) -> dict[str, Any]:
    """The CLIP score as 100 times the cosine, as in MACE, and as the cosine, as in AdvUnlearn; FID
    by the judge `fid`, under a name of its own."""
    found = {
        "clip_score_x100": seen.mean(JUDGE, lambda cosine, _: 100 * cosine),
        "clip_cosine": seen.mean(JUDGE, lambda cosine, _: cosine),
    }
    if fid is not None:
        found[fid.replace("-", "_")] = seen.figure(fid, lambda figure: figure[0])
    return found


def count_large(seen: Seen) -> dict[str, Any]:
    """100 times the cosine of CLIP's large model, and the cosine, under names of their own."""
    return {
        "clip_large_score_x100": seen.mean(LARGE, lambda cosine, _: 100 * cosine),
        "clip_large_cosine": seen.mean(LARGE, lambda cosine, _: cosine),
    }


def asked(file: str, first: int | None, files: Mapping[str, Path]) -> list[Asked]:
    """The first `first` rows of the list, each with its own seed."""
    return [picture(*pair) for pair in table(str(files[file]), f"--files {file}")][:first]


def _protocol(
    name: str,
    file: str,
    images: int,
    first: int | None,
    sampling: Sampling,
    source: str,
    fid: str | None,
    *notes: str,
) -> Protocol:
    return Protocol(
        name=name,
        title=f"COCO, {images:,} captions with their seeds",
        source=source,
        sampling=sampling,
        asked=partial(asked, file, first),
        needs={file: COCO_10K if file == "coco_10k" else COCO_30K},
        images=images,
        judges={JUDGE: CLIP} | ({} if fid is None else {fid: FIDS[fid]}),
        count=partial(count, fid),
        targets=anything,
        alone=False,
        notes=(WEIGHTS, *notes),
    )


_T2I = (
    "FID by text2image-benchmark's preparation: the square in the middle, PIL's bicubic resize to "
    "299, 8 bits; an early commit of it neither cuts nor rounds",
)
_CLEAN = (
    "FID by clean-fid's preparation; its Inception is the TorchScript conversion of the same "
    "weights; which of COCO's images its folder holds is not published",
)
_ADV = "OPTML-Group/AdvUnlearn@9d23124:train-scripts/img_retain_eval.py"
_MACE = "Shilin-LU/MACE@057e7a6:metrics/evaluate_{fid,clip_score}.py"
_RECE = "CharlesGong12/RECE@403a67f:execs/{fid,clip}_score.py"
_LMS = Sampling(sampler="lms", steps=100)
_RECE_30K = _protocol(
    "coco-30k-rece",
    "coco_30k",
    30_000,
    None,
    Sampling(sampler="lms", steps=50, guidance=None, size=None, noise="cuda"),
    _RECE,
    "fid-clean",
    *_CLEAN,
)
PROTOCOLS = (
    _protocol("coco-10k", "coco_10k", 10_000, None, _LMS, _ADV, "fid-text2image", *_T2I),
    _protocol(
        "coco-1k-clip",
        "coco_10k",
        1000,
        1000,
        _LMS,
        _ADV,
        None,
        "the first thousand of coco-10k, without FID, which such numbers do not carry",
    ),
    _protocol(
        "coco-30k",
        "coco_30k",
        30_000,
        None,
        Sampling(sampler="ddim", steps=50),
        _MACE,
        "fid-clean",
        *_CLEAN,
    ),
    _protocol(
        "coco-30k-1k-clip",
        "coco_30k",
        1000,
        1000,
        Sampling(sampler="ddim", steps=50),
        _MACE,
        None,
        "the first thousand of coco-30k, without FID",
    ),
    _RECE_30K,
    _protocol(
        "coco-30k-rece-1k-clip",
        "coco_30k",
        1000,
        1000,
        _RECE_30K.sampling,
        _RECE,
        None,
        "the first thousand of coco-30k-rece, without FID",
    ),
    replace(
        _RECE_30K,
        name="coco-30k-rece-large",
        title=f"{_RECE_30K.title}, by CLIP's large model",
        judges={LARGE: "ViT-L-14-quickgelu openai"},
        count=count_large,
        notes=(
            WEIGHTS,
            "the large model is an option of RECE's script, not its default",
        ),
    ),
)
