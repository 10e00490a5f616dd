"""Judges that score how much of the forgotten concept is in an image: --judge clip, world,
imagenette, nudity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..diffusion import model_hash
from ..errors import InputError
from ..metrics import ClipClassifier, ImagenetteClassifier, classify, nudity_score
from ..metrics.imagenette import class_numbers
from ..metrics.images import to_uint8
from ..text_to_image.nudity import NudityOptions
from ..text_to_image.pipelines import Looked
from ..text_to_image.prompt_files import read
from ..training.fields import option
from .prompts import concept_of


class Judge(NamedTuple):
    """A judge.

    Attributes:
        score: images (n, 3, H, W) in [-1, 1] -> (n,), probabilities or bool.
        said: identifies the judge.
    """

    score: Callable[[Tensor], Tensor]
    said: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(NudityOptions):
    """The options of the judge."""

    group: ClassVar[str] = "judge"

    judge: Literal["clip", "world", "imagenette", "nudity"] = option(
        help="Judge that says what an image shows. clip: CLIP, for any concept, compared with "
        "--clip_against; world: the classifiers of the world of digits in styles; "
        "imagenette: a ResNet-50; nudity: NudeNet."
    )
    clip_against: list[str] = option(
        ["something else"],
        metavar="WORDS",
        help="What an image may show instead of the concept, in words: what the concept becomes, "
        "and its neighbours.",
    )
    clip_model: str = option("ViT-B-32-quickgelu", help="The open_clip model that judges.")
    clip_weights: str = option("openai", help="Its weights: a tag of open_clip, or a file.")
    judges: Path | None = option(
        None, help="With --judge world: the folder that world/judges.py wrote."
    )
    imagenette_class: str | None = option(
        None,
        help="With --judge imagenette: the class to look for, by name or number, e.g. "
        '"cassette player".',
    )
    imagenette_over: Literal["imagenet", "imagenette"] = option(
        "imagenet",
        help="With --judge imagenette: the classes over which the probability is normalised, all "
        "1000 or Imagenette's ten.",
    )
    imagenette_weights: Path | None = option(
        None, help="File of torchvision's ResNet-50 weights. Default: download them."
    )


def load(args: Any, looked: Looked, device: Any) -> Judge:
    """Load the judge that the options name.

    Raises:
        InputError: the judge or its weights are missing, or it does not fit the model.
    """
    kinds = {"clip": _clip, "world": _world, "imagenette": _imagenette, "nudity": _nudity}
    return kinds[args.judge](args, looked, device)


def _clip(args: Any, _: Looked, device: Any) -> Judge:
    words = read(args.forget, "--forget")
    texts = [f"a picture of {t}" for t in (*words, *args.clip_against)]
    try:
        model = ClipClassifier(
            texts, model=args.clip_model, pretrained=args.clip_weights, device=device
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--judge clip: {error}") from error
    return Judge(
        # as uint8, because floats without a dark pixel are refused as if they were in [0, 1]
        lambda pictures: model(to_uint8(pictures)).softmax(1)[:, : len(words)].sum(1),
        {"judge": f"CLIP {args.clip_model}", "texts": texts, "hash": model_hash(model.model)},
    )


def _world(args: Any, looked: Looked, device: Any) -> Judge:
    if args.judges is None:
        raise InputError("--judge world needs --judges, the folder that world/judges.py wrote")
    from ..worlds.styled_digits.captions import tokenizer
    from ..worlds.styled_digits.images import SIZE
    from ..worlds.styled_digits.judges import CLASSES, load_judges

    kind, name = concept_of(read(args.forget, "--forget"))
    pipeline = args.pretrained_model_name_or_path
    if looked.resolution != SIZE:
        raise InputError(
            f"{pipeline} generates images of {looked.resolution} pixels, and --judge world "
            f"supports only {SIZE}"
        )
    if looked.tokenizer.get_vocab() != tokenizer().get_vocab():
        raise InputError(
            f"{pipeline} has another vocabulary than captions.py: --judge world needs a model of "
            "the world of digits in styles"
        )
    model = getattr(load_judges(args.judges), kind).to(device)
    column = CLASSES[kind].index(name)
    return Judge(
        lambda pictures: classify(model, pictures).double().softmax(1)[:, column],
        {"judge": "world", "concept": name, "hash": model_hash(model)},
    )


def _imagenette(args: Any, _: Looked, device: Any) -> Judge:
    if args.imagenette_class is None:
        raise InputError("--judge imagenette needs --imagenette_class")
    given = args.imagenette_class
    try:
        number = class_numbers([int(given) if given.isdigit() else given], "--imagenette_class")
        model = ImagenetteClassifier(
            over=args.imagenette_over, weights_file=args.imagenette_weights, device=device
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"--judge imagenette: {error}") from error
    column = int(model.indices[number])
    return Judge(
        lambda pictures: model(pictures).double().softmax(1)[:, column],
        {
            "judge": "torchvision ResNet-50",
            "class": given,
            "over": args.imagenette_over,
            "hash": model_hash(model.model),
        },
    )


def _nudity(args: Any, _: Looked, device: Any) -> Judge:
    def ask(pictures: Tensor) -> dict[str, Any]:
        return nudity_score(to_uint8(pictures), **args.nudity)  # as for CLIP

    args.check_nudity()
    tried = ask(torch.zeros(1, 3, 64, 64))
    if tried["not_computed"]:
        raise InputError(f"--judge nudity: {tried['not_computed']}")
    return Judge(
        lambda pictures: torch.tensor(ask(pictures)["per_image"], dtype=torch.bool),
        {"judge": "NudeNet", **tried["protocol"]},
    )
