"""Who says how much of the forgotten concept is in a picture: --judge world, imagenette, nudity."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion import model_hash
from ..errors import InputError
from ..metrics import ImagenetteClassifier, classify, nudity_score
from ..metrics.imagenette import class_numbers
from ..text_to_image import nudity
from ..text_to_image.pipelines import Looked
from ..text_to_image.prompts import read
from .prompts import concept_of

NAMES = ("world", "imagenette", "nudity")


class Judge(NamedTuple):
    """`score`: pictures (n, 3, H, W) in [-1, 1] -> (n,), a probability or bool; `said` identifies
    the judge."""

    score: Callable[[Tensor], Tensor]
    said: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("judge").add_argument
    add("--judge", choices=NAMES, required=True)
    add("--judges", type=Path, help="world: folder made by world/judges.py")
    add("--imagenette_class", help='name or number, e.g. "cassette player"')
    add("--imagenette_over", choices=("imagenet", "imagenette"), default="imagenet")
    add("--imagenette_weights", type=Path, help="torchvision's ResNet-50; default: its download")
    nudity.add_arguments(add)


def load(args: argparse.Namespace, looked: Looked, device: Any) -> Judge:
    """Raises:
    InputError: the judge, or what it needs, is not there.
    """
    return {"world": _world, "imagenette": _imagenette, "nudity": _nudity}[args.judge](
        args, looked, device
    )


def _world(args: argparse.Namespace, looked: Looked, device: Any) -> Judge:
    if args.judges is None:
        raise InputError("--judge world needs --judges, the folder made by world/judges.py")
    from ..worlds.styled_digits.captions import tokenizer
    from ..worlds.styled_digits.images import SIZE
    from ..worlds.styled_digits.judges import CLASSES, load_judges

    kind, name = concept_of(read(args.forget, "--forget"))
    pipeline = args.pretrained_model_name_or_path
    if looked.resolution != SIZE:
        raise InputError(f"{pipeline} draws {looked.resolution} pixels, the judges know {SIZE}")
    if looked.tokenizer.get_vocab() != tokenizer().get_vocab():
        raise InputError(f"{pipeline} has another vocabulary than captions.py: it is not of there")
    model = getattr(load_judges(args.judges), kind).to(device)
    column = CLASSES[kind].index(name)
    return Judge(
        lambda pictures: classify(model, pictures).double().softmax(1)[:, column],
        {"judge": "world", "concept": name, "hash": model_hash(model)},
    )


def _imagenette(args: argparse.Namespace, _: Looked, device: Any) -> Judge:
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
        {"judge": "torchvision ResNet-50", "class": given, "over": args.imagenette_over,
         "hash": model_hash(model.model)},
    )  # fmt: skip


def _nudity(args: argparse.Namespace, _: Looked, device: Any) -> Judge:
    def ask(pictures: Tensor) -> dict[str, Any]:
        return nudity_score(pictures, **nudity.chosen(args))

    nudity.check(args)
    tried = ask(torch.zeros(1, 3, 64, 64))
    if tried["not_computed"]:
        raise InputError(f"--judge nudity: {tried['not_computed']}")
    return Judge(
        lambda pictures: torch.tensor(ask(pictures)["per_image"], dtype=torch.bool),
        {"judge": "NudeNet", **tried["protocol"]},
    )
