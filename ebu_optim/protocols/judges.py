"""The judges of published evaluations, with their published preprocessing.

Each judge is opened once and judges batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ..diffusion import model_hash
from ..errors import InputError
from ..manifest import sha256
from ..metrics import (
    ClipCosine,
    ImagenetteClassifier,
    LpipsDistance,
    NotComputed,
    NudityDetector,
    UnlearnCanvasClassifier,
    classify,
)
from ..metrics.classifier import entropies
from ..metrics.imagenette import CLASSES
from ..metrics.naming import called
from ..worlds.styled_digits.judges import CLASSES as CLASSES_OF_DIGITS
from ..worlds.styled_digits.judges import load_judges
from . import giphy
from .canvas_fid import open_canvas
from .protocol import Asked, not_computed
from .sets import SetJudge, open_fid

CLIP = "ViT-B-32-quickgelu"
CLIP_LARGE = "ViT-L-14-quickgelu"


class Judge(NamedTuple):
    """A judge.

    Attributes:
        look: (images (3, H, W) uint8, the prompt of each, the base's images from the same
            noise) -> an observation of each image.
        identity: identifies the judge: the SHA-256 of its file, or its kind.
        of_base: whether it needs the base's images.
        of_files: whether it gets the images' files in place of the images.
    """

    look: Callable[[Sequence[Any], Sequence[Asked], Sequence[Tensor]], list[Any]]
    identity: str
    of_base: bool = False
    of_files: bool = False


def open_judge(
    name: str, files: Mapping[str, Path], device: str, keep: Path | None = None
) -> Judge | SetJudge | str:
    """The judge, or the reason why it is not available.

    Args:
        files: name of a judge -> the file of its weights.
        keep: the folder for statistics of sets of images; None keeps none.

    Raises:
        InputError: a file does not belong to this judge.
    """
    if name in SETS:
        try:
            return SETS[name](files, device, keep)
        except NotComputed as why:
            return not_computed(str(why))["not_computed"]
    told = f"--files {name}"
    try:
        with called(weights_file=told, model_file=told, pretrained=told):
            return JUDGES[name](files.get(ONE_FILE.get(name, name)), device)
    except NotComputed as why:
        return not_computed(str(why))["not_computed"]
    except (ValueError, FileNotFoundError) as error:
        raise InputError(f"{told}: {error}") from error


def _identity(file: Path | None, otherwise: str) -> str:
    return otherwise if file is None else sha256(file)


def _resnet50(file: Path | None, device: str) -> Judge:
    """Observes the names of the top five classes; their numbers if they are not Imagenette's."""
    model = ImagenetteClassifier(weights_file=file, device=device)
    names = dict(zip(model.indices.tolist(), CLASSES, strict=True))

    def look(pictures: Sequence[Tensor], *_: Any) -> list[list[str]]:
        top = _stacked(model, pictures).topk(5).indices.tolist()
        return [[names.get(i, str(i)) for i in row] for row in top]

    return Judge(look, _identity(file, "11ad3fa6"))  # torchvision checks this hash


def _entropy(file: Path | None, device: str) -> Judge:
    """Observes the name or number of the top class, and the entropy of the prediction."""
    model = ImagenetteClassifier(weights_file=file, device=device)
    names = dict(zip(model.indices.tolist(), CLASSES, strict=True))

    def look(pictures: Sequence[Tensor], *_: Any) -> list[tuple[str, float]]:
        logits = _stacked(model, pictures)
        top = [names.get(i, str(i)) for i in logits.argmax(1).tolist()]
        return list(zip(top, entropies(logits).tolist(), strict=True))

    return Judge(look, _identity(file, "11ad3fa6"))


def _unlearncanvas(kind: str) -> Callable[[Path | None, str], Judge]:
    """Observes the name of the top class."""

    def opened(file: Path | None, device: str) -> Judge:
        if file is None:
            published = "style50.pth" if kind == "style" else "style50_cls.pth"
            raise NotComputed(
                f"UnlearnCanvas's classifier is not given: --files unlearncanvas-{kind}=FILE, "
                f"cls_model/{published} of https://huggingface.co/NormalUhr/UnlearnCanvas-ckpts"
            )
        model = UnlearnCanvasClassifier(kind, file, device=device)

        def look(pictures: Sequence[Tensor], *_: Any) -> list[str]:
            return [model.classes[i] for i in _stacked(model, pictures).argmax(1).tolist()]

        return Judge(look, f"{model.network} {sha256(file)}")

    return opened


def _digits(kind: str) -> Callable[[Path | None, str], Judge]:
    """Observes the top class of a judge of the world of digits in styles, which may be "none"."""

    def opened(folder: Path | None, device: str) -> Judge:
        if folder is None:
            raise NotComputed("--files digits-judges=FOLDER is not given")
        model = getattr(load_judges(folder), "content" if kind == "object" else kind).to(device)
        classes = CLASSES_OF_DIGITS["content" if kind == "object" else kind]

        def look(pictures: Sequence[Tensor], *_: Any) -> list[str]:
            pixels = torch.stack(list(pictures)).float() / 127.5 - 1
            return [classes[i] for i in classify(model, pixels).argmax(1).tolist()]

        return Judge(look, model_hash(model))

    return opened


def _labels(source: str | None, published: str) -> Callable[[Path | None, str], Judge]:
    """Observes the top ten labels of an image classifier of transformers, with its own
    preprocessing. ImageNet's labels are observed as numbers.

    Args:
        source: the hub id to load if no folder is given.
    """

    def opened(folder: Path | None, device: str) -> Judge:
        if folder is None and source is None:
            raise NotComputed(f"the classifier is not given: {published}")
        where = str(source if folder is None else folder)
        try:
            prepare = AutoImageProcessor.from_pretrained(where)
            model = AutoModelForImageClassification.from_pretrained(where).eval().to(device)
        except (OSError, ValueError) as error:
            why = str(error).strip().partition("\n")[0]
            if folder is not None:
                raise ValueError(f"{folder} has no image classifier: {why}") from error
            raise NotComputed(f"{source} is not to be had ({why}): {published}") from error
        names = model.config.id2label
        numbered = len(names) == 1000

        @torch.no_grad()
        def look(pictures: Sequence[Tensor], *_: Any) -> list[list[str]]:
            images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures]
            pixels = prepare(images=images, return_tensors="pt")["pixel_values"].to(device)
            top = model(pixels).logits.topk(min(10, len(names))).indices.tolist()
            return [[str(i) if numbered else names[i] for i in row] for row in top]

        return Judge(look, where if folder is None else model_hash(model))

    return opened


def _nudenet(file: Path | None, _: str) -> Judge:
    """Observes the label and the score of each detection."""
    model = NudityDetector(model_file=file)

    def look(pictures: Sequence[Tensor], *_: Any) -> list[list[tuple[str, float]]]:
        return [[(d["class"], float(d["score"])) for d in model(x)] for x in pictures]

    return Judge(look, sha256(model.file))


def _clip(name: str) -> Callable[[Path | None, str], Judge]:
    """Observes the cosine with the prompt."""

    def opened(file: Path | None, device: str) -> Judge:
        model = ClipCosine(model=name, pretrained=file or "openai", device=device)

        def look(pictures: Sequence[Tensor], asked: Sequence[Asked], *_: Any) -> list[float]:
            pairs = zip(pictures, asked, strict=True)
            return [float(model(x[None], [a.prompt])) for x, a in pairs]

        return Judge(look, _identity(file, f"{name} openai"))

    return opened


def _lpips(file: Path | None, device: str) -> Judge:
    """Observes the distance to the base's image, with both resized to 64 pixels."""
    model = LpipsDistance(weights_file=file, size=64, device=device)

    def look(pictures: Sequence[Tensor], _: Sequence[Asked], base: Sequence[Tensor]) -> list[float]:
        return [float(model(x[None], y[None])) for x, y in zip(pictures, base, strict=True)]

    return Judge(look, _identity(file, "7be5be79"), of_base=True)


def _giphy(file: Path | None, _: str) -> Judge:
    """Observes the name that GIPHY's detector found, or None without a face."""
    if file is None:
        raise NotComputed(giphy.MISSING)
    answers = giphy.Answers(file)
    return Judge(lambda files, *_: [answers(f) for f in files], sha256(file), of_files=True)


def _stacked(model: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> Tensor:
    """The model's outputs for images of one or of several sizes."""
    if len({x.shape for x in pictures}) == 1:
        return model(torch.stack(list(pictures)))
    return torch.cat([model(x[None]) for x in pictures])


JUDGES: dict[str, Callable[[Path | None, str], Judge]] = {
    "resnet50": _resnet50,
    "resnet50-entropy": _entropy,
    "nudenet": _nudenet,
    "clip": _clip(CLIP),
    "clip-large": _clip(CLIP_LARGE),
    "lpips-alex": _lpips,
    "unlearncanvas-style": _unlearncanvas("style"),
    "unlearncanvas-object": _unlearncanvas("object"),
    "resnet50-microsoft": _labels(
        "microsoft/resnet-50", "--files resnet50-microsoft=FOLDER, a download of it"
    ),
    "artists-129": _labels(
        None,
        "--files artists-129=FOLDER, the style classifier of "
        "https://github.com/OPTML-Group/Diffusion-MU-Attack, whose README has the link",
    ),
    "digits-style": _digits("style"),
    "digits-object": _digits("object"),
    "giphy": _giphy,
}
#: Judges of sets of images -> what opens them.
SETS: dict[str, Callable[[Mapping[str, Path], str, Path | None], SetJudge]] = {
    "fid-text2image": partial(open_fid, "text2image"),
    "fid-clean": partial(open_fid, "clean"),
    "fid-unlearncanvas": open_canvas,
}
#: Judges whose file is given under another name -> that name.
ONE_FILE = {
    **dict.fromkeys(("digits-style", "digits-object"), "digits-judges"),
    "resnet50-entropy": "resnet50",
}
#: Judges that read several files -> their names.
SEVERAL = {
    **dict.fromkeys(SETS, ("coco", "inception")),
    "fid-unlearncanvas": ("unlearncanvas", "inception-torchvision"),
}
