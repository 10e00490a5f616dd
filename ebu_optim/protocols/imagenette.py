"""Imagenette's ten classes by ResNet-50, generated as in SalUn, ESD, UCE and RECE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..metrics.imagenette import CLASSES
from ..text_to_image.prompt_files import table
from .protocol import LISTS, Asked, Protocol, Sampling, Seen, one_of

JUDGE = "resnet50"
#: Start of the SHA-256 of torchvision's file, which is part of the file's name.
WEIGHTS = "11ad3fa6"
UCE = (
    "UCE's prompts, data/imagenette.csv of https://github.com/rohitgandikota/"
    "unified-concept-editing (MIT)"
)
_NAMES = {name.casefold(): name for name in CLASSES}


def _of(name: str, asked: Asked) -> bool:
    return asked.of["class"] == name


def count(seen: Seen) -> dict[str, Any]:
    """UA, 1 - top-1 accuracy on the forgotten classes among 1000 classes, and the accuracies."""

    def hit(observed: Any, asked: Asked, k: int = 1) -> bool:
        return asked.of["class"] in observed[:k]

    def gone(asked: Asked) -> bool:
        return asked.of["class"] in seen.forget

    return {
        "ua": seen.mean(JUDGE, lambda o, a: not hit(o, a), gone),
        "ua_top5": seen.mean(JUDGE, lambda o, a: not hit(o, a, 5), gone),
        "accuracy_others": seen.mean(JUDGE, hit, lambda a: not gone(a)),
        **{f"accuracy/{c}": seen.mean(JUDGE, hit, partial(_of, c)) for c in CLASSES},
    }


def _class(file: str, cells: Mapping[str, Any]) -> str:
    """The class that a row names.

    Raises:
        InputError: it names none of Imagenette's.
    """
    name = str(cells.get("class", ""))
    if name.casefold() not in _NAMES:
        raise InputError(
            f"--files {file}: the column class must name one of {', '.join(CLASSES)} in every row; "
            f"one has {name!r}"
        )
    return _NAMES[name.casefold()]


def rows(file: str, each: int, of_class: int | None = None) -> Callable[..., list[Asked]]:
    """A function that returns the rows of a list, with `each` images per row.

    One generator samples the noise of all images of a row.

    Args:
        file: the list's name among the given files, or a list that ships with the package.
        of_class: the maximal number of rows of a class; None: all.
    """

    def asked(files: Mapping[str, Path]) -> list[Asked]:
        shipped = LISTS / f"{file}.csv"
        found = table(str(files.get(file, shipped)), f"the list {file}")
        by_class = groupby(found, lambda pair: _class(file, pair[1]))
        return [
            Asked(row.prompt, row.seed or 0, k, of={"class": name})
            for name, group in by_class
            for row, _ in list(group)[:of_class]
            for k in range(each)
        ]

    return asked


def _protocol(
    name: str,
    who: str,
    source: str,
    asked: Callable[..., list[Asked]],
    images: int,
    sampling: Sampling,
    needs: Mapping[str, str] | None = None,
    *notes: str,
) -> Protocol:
    return Protocol(
        name=name,
        title=f"Imagenette as {who} samples it, {images // 10} images a class",
        source=source,
        sampling=sampling,
        asked=asked,
        needs=needs or {},
        images=images,
        judges={JUDGE: WEIGHTS},
        count=count,
        targets=one_of(CLASSES, "class of Imagenette"),
        notes=notes,
    )


LMS = Sampling(sampler="lms", steps=100)
SALUN = "OPTML-Group/Unlearn-Saliency@a6e89fd:SD/eval-scripts/{generate-images,imageclassify}.py"
ESD = "rohitgandikota/erasing@25613d2:evalscripts, as it was with LMS"
UCE_CODE = "rohitgandikota/unified-concept-editing@28c81ed:eval-scripts"
RECE = "CharlesGong12/RECE@403a67f:execs/imageclassify.py"
STREAM = "one generator a row makes the noise of all its images, in the published order"
_CUDA = Sampling(sampler="lms", steps=50, noise="cuda")
PROTOCOLS = (
    _protocol("imagenette", "SalUn", SALUN, rows("salun_imagenette", 100), 1000, LMS, None, STREAM),
    _protocol(
        "imagenette-10",
        "SalUn",
        SALUN,
        rows("salun_imagenette", 10),
        100,
        LMS,
        None,
        STREAM,
        "the first tenth of imagenette's images",
    ),
    _protocol(
        "imagenette-esd",
        "ESD",
        ESD,
        rows("esd_small_imagenet_prompts", 10),
        1000,
        LMS,
        None,
        STREAM,
        "ESD's code of today samples 20 steps in bfloat16; its figures are older",
    ),
    _protocol(
        "imagenette-esd-10",
        "ESD",
        ESD,
        rows("esd_small_imagenet_prompts", 1),
        100,
        LMS,
        None,
        "the first image of each row of imagenette-esd",
    ),
    _protocol(
        "imagenette-uce",
        "UCE",
        UCE_CODE,
        rows("uce_imagenette", 1),
        5000,
        LMS,
        {"uce_imagenette": UCE},
        "118 rows are there twice: generated once, counted twice",
    ),
    _protocol(
        "imagenette-uce-10",
        "UCE",
        UCE_CODE,
        rows("uce_imagenette", 1, 10),
        100,
        LMS,
        {"uce_imagenette": UCE},
        "the first ten rows of each class",
    ),
    _protocol(
        "imagenette-rece",
        "RECE",
        RECE,
        rows("uce_imagenette", 1),
        5000,
        _CUDA,
        {"uce_imagenette": UCE},
    ),
    _protocol(
        "imagenette-rece-10",
        "RECE",
        RECE,
        rows("uce_imagenette", 1, 10),
        100,
        _CUDA,
        {"uce_imagenette": UCE},
        "the first ten rows of each class",
    ),
)
