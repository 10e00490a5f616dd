"""The options of evaluate.py, checked before anything is generated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from ..errors import InputError
from ..metrics.imagenette import CLASSES
from ..metrics.images import RGBImages
from ..training.fields import as_dict, option
from .nudity import NudityOptions
from .pipelines import Model
from .prompt_files import Row, read, rows
from .prompts import fill

RESULT = "evaluation.json"
WEIGHTS = "File of {} weights, for machines without a network."
#: Options that must agree for images to be compared one by one.
SAME = ("seed", "num_inference_steps", "guidance_scale", "resolution")


@dataclass(frozen=True, kw_only=True)
class Evaluation(NudityOptions, Model):
    """What to generate and how to measure it.

    Raises:
        InputError: a value is out of range; prompts, folders or files do not fit the metrics; the
            output folder holds a finished evaluation.
    """

    base_model: str | None = option(
        None, help="The model that a `changed` or `lora` folder belongs to."
    )
    prompts: list[str] | None = option(
        None,
        help="Prompts or files of them: .txt, or .csv and .parquet with a column `prompt`, "
        "whose rows may have their own seed and guidance scale.",
    )
    ignore_row_settings: bool = option(
        False,
        help="Generate every row with --seed and --guidance_scale, not with the row's values.",
    )
    truncate: bool = option(
        False, help="Cut prompts that are too long for the tokenizer. Published lists need this."
    )
    imagenette: bool = option(
        False, help="Generate images of a prompt for each of Imagenette's ten classes."
    )
    template: str = option("an image of {}", help="Template of the prompts of --imagenette.")
    forget: list[str] = option(
        [], help="The forgotten prompts or classes. All other images count as kept."
    )
    images_per_prompt: int = option(10, help="Images of each prompt.")
    num_inference_steps: int = option(50, help="DDIM steps of each image.")
    guidance_scale: float | None = option(
        None, help="Guidance scale of each image. Default: that of the model's family."
    )
    sample_batch_size: int = option(4, help="Images that are generated at once.")
    seed: int = option(0, help="Seed of image 0 of each prompt; image k has seed + k.")
    half: bool = option(False, help="Generate in float16; needs a GPU.")
    output_dir: Path = option(help="Folder for the images and figures.")
    overwrite: bool = option(False, help="Generate and measure the images again.")
    metrics: list[Literal["imagenette", "nudity", "clip_score", "lpips", "fid"]] = option(
        [], nargs="*", help="Metrics to compute; none: only generate the images."
    )
    reference_dir: Path | None = option(
        None, help="Output folder of this script for the base model; lpips compares with it."
    )
    real_images: Path | None = option(
        None, help="Folder of real images of the kept prompts; fid compares with it."
    )
    noise_images: int = option(
        64, help="Images of noise that ResNet-50 classifies too, for comparison."
    )
    over: Literal["imagenet", "imagenette"] = option(
        "imagenet", help="Classes over which CE and RA are computed: all 1000 or Imagenette's ten."
    )
    resnet_weights: Path | None = option(None, help=WEIGHTS.format("ResNet-50"))
    alexnet_weights: Path | None = option(None, help=WEIGHTS.format("--lpips_net's"))
    inception_weights: Path | None = option(None, help=WEIGHTS.format("FID's"))
    nudity_counting: Literal["images", "detections", "score"] = option(
        "images",
        help="What the nudity score counts: images with a detection, detections, or the mean "
        "of each image's highest score.",
    )
    lpips_net: Literal["alex", "vgg", "squeeze"] = option("alex", help="Backbone of LPIPS.")
    clip_scale: Literal["cosine", "x100", "w2.5"] = option(
        "cosine",
        help="Scale of the CLIP score: the cosine, 100 times it, or CLIPScore's 2.5 "
        "max(cosine, 0).",
    )
    clip_model: str = option("ViT-B-32-quickgelu", help="The open_clip model of the CLIP score.")
    clip_weights: str = option("openai", help="Its weights: a tag of open_clip, or a file.")

    @cached_property
    def rows(self) -> list[Row]:
        """The prompts, each with its own seed and guidance scale if these are used."""
        if self.imagenette:
            return [Row(fill(self.template, c)) for c in CLASSES]
        found = rows(self.prompts or [], "--prompts")
        plain = [Row(r.prompt) for r in found] if self.ignore_row_settings else found
        return list(dict.fromkeys(plain))

    @property
    def texts(self) -> list[str]:
        """The prompt of each row."""
        return [row.prompt for row in self.rows]

    @cached_property
    def forgotten(self) -> list[str]:
        """The prompts that the model should have forgotten."""
        if self.imagenette:
            return [fill(self.template, c) for c in self.forget]
        return read(self.forget, "--forget")

    @cached_property
    def files(self) -> dict[str, str]:
        """Name of each image -> its prompt."""
        return {name: row.prompt for name, row in self.drawn.items()}

    @cached_property
    def drawn(self) -> dict[str, Row]:
        """Name of each image -> its prompt, seed and guidance."""
        return {
            f"{i:04d}_{k:04d}.png": Row(
                row.prompt,
                (self.seed if row.seed is None else row.seed) + k,
                self.guidance_scale if row.guidance is None else row.guidance,
            )
            for i, row in enumerate(self.rows)
            for k in range(self.images_per_prompt)
        }

    def said(self) -> dict[str, str]:
        """All options as text, with the prompts that they resolve to."""
        own = any(row != Row(row.prompt) for row in self.rows)
        texts = [tuple(row) for row in self.rows] if own else self.texts
        found = {**as_dict(self), "texts": texts, "forgotten": self.forgotten}
        return {k: str(v) for k, v in found.items()}

    def __post_init__(self) -> None:
        for name in (
            "images_per_prompt",
            "num_inference_steps",
            "sample_batch_size",
            "noise_images",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1; got {getattr(self, name)}")
        self.check_nudity()
        if self.half and not torch.cuda.is_available():
            raise InputError("--half generates in float16, which needs a GPU; leave it out")
        _check_prompts(self)
        _check_metrics(self)
        folder = self.reference_dir
        if folder and not (folder / RESULT).is_file():
            raise InputError(
                f"--reference_dir {folder} has no {RESULT}: give an output folder of this script"
            )
        if "lpips" in self.metrics:
            _check_reference(self)
        if (self.output_dir / RESULT).exists() and not self.overwrite:
            raise InputError(
                f"--output_dir {self.output_dir} holds a finished evaluation: delete its {RESULT} "
                "to measure the same images again, give --overwrite to generate them again too, "
                "or give another folder"
            )


def _check_prompts(args: Evaluation) -> None:
    if bool(args.prompts) == args.imagenette:
        raise InputError("give either --prompts or --imagenette")
    if args.template.count("{}") != 1:
        raise InputError(f'--template needs one "{{}}"; got {args.template!r}')
    texts = set(args.texts)
    for i, text in enumerate(args.forgotten):
        if text not in texts:
            given = args.forget[i] if args.imagenette else text
            what = f" of {', '.join(CLASSES)}" if args.imagenette else ""
            raise InputError(f"--forget {given!r} must be one of the prompts{what}")


def _check_metrics(args: Evaluation) -> None:
    if "imagenette" in args.metrics and not (args.imagenette and args.forget):
        raise InputError("--metrics imagenette needs --imagenette and --forget: give both")
    for metric, name in (("lpips", "reference_dir"), ("fid", "real_images")):
        folder = getattr(args, name)
        if metric in args.metrics and not (folder and folder.is_dir()):
            raise InputError(f"--metrics {metric} needs a folder as --{name}; got {folder}")
    for name in ("resnet_weights", "alexnet_weights", "inception_weights"):
        if (file := getattr(args, name)) and not file.is_file():
            raise InputError(f"--{name} {file}: there is no such file")
    if "fid" in args.metrics:
        kept = sum(text not in args.forgotten for text in args.texts) or len(args.texts)
        if kept * args.images_per_prompt < 2:
            raise InputError("--metrics fid needs two images or more: give --images_per_prompt 2")
        assert args.real_images
        try:
            RGBImages(args.real_images, "--real_images", least=2)
        except ValueError as error:
            raise InputError(str(error)) from error


def _check_reference(args: Evaluation) -> None:
    """Check that the reference images pair up with the images to generate."""
    assert args.reference_dir
    reference = json.loads((args.reference_dir / RESULT).read_text())
    before = reference["protocol"]["options"]
    for name in SAME:  # otherwise the distance would include that between different noise
        value = getattr(args, name)  # None: the family's default, which is not known yet
        if value is not None and before[name] != str(value):
            raise InputError(
                f"--reference_dir {args.reference_dir} was generated with --{name} "
                f"{before[name]}, not {value}: measure the base with the same options"
            )
    if reference["images"] != args.files or before["texts"] != args.said()["texts"]:
        raise InputError(
            f"--reference_dir {args.reference_dir} has other prompts or another number of "
            "images: measure the base with the same options"
        )
