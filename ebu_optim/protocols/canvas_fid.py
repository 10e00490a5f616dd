"""UnlearnCanvas's FID: the images of the grid against the data set's images of the same cells.

The cells of what was forgotten are left out on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

from ..errors import InputError
from ..manifest import contents, key, sha256
from ..metrics import NotComputed, inception
from ..metrics.frechet import distance_of
from ..metrics.unlearncanvas import OBJECTS, STYLES
from .protocol import Asked
from .sets import DRAWN, Features, SetJudge, weights_given_as

REAL, WEIGHTS = "--files unlearncanvas", "--files inception-torchvision"
SOURCE = "https://huggingface.co/datasets/OPTML-Group/UnlearnCanvas"
#: Start of the SHA-256 of torchvision's file, which is part of the file's name.
GOOGLE = "0cc3c7bd"
EACH = range(1, 6)  # the first five images of a cell


def open_canvas(files: Mapping[str, Path], device: str, keep: Path | None) -> SetJudge:
    """FID by torchvision's Inception.

    Args:
        files: ``unlearncanvas``: the data set's folder; ``inception-torchvision``: the weights.
        keep: the folder for statistics; None keeps none.

    Raises:
        NotComputed: the data set is not given, or the weights are not to be had.
        InputError: a file or an image does not fit.
    """
    if "unlearncanvas" not in files:
        raise NotComputed(f"the data set is not given: {REAL}=FOLDER, of {SOURCE}")
    real = cells(files["unlearncanvas"])
    file = files.get("inception-torchvision")
    with weights_given_as(WEIGHTS):
        weights = inception.torchvision_weights_of(file, progress=True)
        network = cache(partial(inception.torchvision_network, weights, device))
        network()
    by = GOOGLE if file is None else sha256(file)[: len(GOOGLE)]
    features = Features("unlearncanvas", network, by, device, keep)
    read = {cell: contents(of) for cell, of in real.items()}  # once: 5,100 files
    said = f"{REAL}={files['unlearncanvas']}", "download them again"

    def look(pictures: Sequence[Path], content: str, forget: Sequence[str]) -> float:
        kept = [cell for cell in real if not {*cell} & {*forget}]
        files_of = [file for cell in kept for file in real[cell]]
        reference = features.statistics(files_of, key([[*c, read[c]] for c in kept]), said)
        return distance_of(features.statistics(pictures, content, DRAWN, "jpeg"), reference)

    number = sum(map(len, real.values()))
    return SetJudge(look, f"{by} n={number} {key([[*c, read[c]] for c in real])}", counts)


def counts(asked: Asked, forget: Sequence[str]) -> bool:
    return not {*asked.of.values()} & {*forget}


def cells(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """(style, object) -> the images of the data set.

    Raises:
        InputError: images are missing.
    """
    found = {
        (style, thing): [folder / style / thing / f"{i}.jpg" for i in EACH]
        for style, thing in product(STYLES, OBJECTS)
    }
    every = [file for of in found.values() for file in of]
    missing = [file for file in every if not file.is_file()]
    if missing:
        raise InputError(
            f"{REAL}={folder}: {len(missing):,} of {len(every):,} images are missing, such as "
            f"{missing[0].relative_to(folder)}: give the folder of {SOURCE}, with "
            "STYLE/OBJECT/1.jpg to 5.jpg"
        )
    return found
