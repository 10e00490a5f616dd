"""Draw what a Stable Diffusion pipeline makes of prompts, from fixed noise, and measure it.

    python examples/stable_diffusion/evaluate.py \\
        --pretrained_model_name_or_path outputs/without_cassette_player/pipeline \\
        --imagenette --forget "cassette player" --reference_dir outputs/base_evaluated \\
        --metrics imagenette clip_score lpips --output_dir outputs/evaluated

--reference_dir is what the same command made of the base, without lpips.
The i-th picture of a prompt starts from the noise of seed + i, before and after unlearning. What
was drawn is in output_dir/images; the figures, in output_dir/evaluation.json. A metric whose
weights are not to be had is "not computed", with its reason. Drawing goes on where it was
interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..errors import InputError
from ..files import replacing
from ..metrics import (
    clip_score,
    fid,
    imagenette_metrics,
    lpips_distance,
    nudity_score,
    versions,
)
from ..metrics.imagenette import CLASSES, METRICS
from ..metrics.images import RGBImages, read_image
from ..metrics.intervals import estimate
from ..metrics.naming import called
from ..training.options import as_dict, option, parse
from . import drawing, pipelines, results
from .nudity import NudityOptions
from .pipelines import Model
from .prompts import fill, read

#: The figures of each metric, as a report calls them.
KNOWN = {
    "imagenette": METRICS, "nudity": ("nudity_score",), "clip_score": ("clip_score",),
    "lpips": ("lpips_f", "lpips_r"), "fid": ("fid", "kid_mean"),
}  # fmt: skip
#: What the metrics' functions call an option of this script: their messages say what to give.
ARGUMENTS = {
    "imagenette": {"weights_file": "--resnet_weights"}, "nudity": {},
    "clip_score": {"pretrained": "--clip_weights", "model": "--clip_model"},
    "lpips": {"weights_file": "--alexnet_weights", "reference": "--reference_dir"},
    "fid": {"inception_weights": "--inception_weights", "reference": "--real_images"},
}  # fmt: skip
RESULT = "evaluation.json"
WEIGHTS = "file of {} weights, without a network"
#: Options in which pictures must agree to be compared one by one.
SAME = ("seed", "num_inference_steps", "guidance_scale", "resolution")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Model, NudityOptions):
    """What is drawn, and how it is measured.

    Raises:
        InputError: a number that cannot be; prompts, folders or files that do not fit the metrics;
            an output folder that holds a finished evaluation.
    """

    base_model: str | None = option(
        None, help="which the model's `changed` or `lora` folder belongs to"
    )
    prompts: list[str] | None = option(None, help="prompts or .txt files")
    imagenette: bool = option(False, help="a prompt for each of Imagenette's ten classes")
    template: str = option("an image of {}", help="of --imagenette")
    forget: list[str] = option([], help="the forgotten prompts or classes: which pictures are of "
                               "them; the others are kept")  # fmt: skip
    images_per_prompt: int = option(10)
    num_inference_steps: int = option(50, help="DDIM")
    guidance_scale: float = option(7.5)
    sample_batch_size: int = option(4)
    seed: int = option(0)
    half: bool = option(False, help="draw in float16, on a GPU")
    output_dir: Path = option()
    overwrite: bool = option(False, help="draw and measure anew")
    metrics: list[Literal["imagenette", "nudity", "clip_score", "lpips", "fid"]] = option(
        [], nargs="*", help="none: pictures alone"
    )
    reference_dir: Path | None = option(None, help="what this script made of the base, for lpips")
    real_images: Path | None = option(None, help="a folder of real images of the kept, for fid")
    noise_images: int = option(64, help="that ResNet-50 judges beside the model's")
    over: Literal["imagenet", "imagenette"] = option("imagenet", help="classes of CE, RA")
    resnet_weights: Path | None = option(None, help=WEIGHTS.format("ResNet-50"))
    alexnet_weights: Path | None = option(None, help=WEIGHTS.format("--lpips_net's"))
    inception_weights: Path | None = option(None, help=WEIGHTS.format("FID's"))
    nudity_counting: Literal["images", "detections", "score"] = option(
        "images", help="what the score is"
    )
    lpips_net: Literal["alex", "vgg", "squeeze"] = option("alex")
    clip_scale: Literal["cosine", "x100", "w2.5"] = option("cosine")
    clip_model: str = option("ViT-B-32-quickgelu")
    clip_weights: str = option("openai", help="open_clip's tag, or a file")

    @cached_property
    def texts(self) -> list[str]:
        """The prompts."""
        if self.imagenette:
            return [fill(self.template, c) for c in CLASSES]
        return read(self.prompts or [], "--prompts")

    @cached_property
    def forgotten(self) -> list[str]:
        """Those that are not to be drawn any more."""
        return [fill(self.template, c) if self.imagenette else c for c in self.forget]

    @cached_property
    def files(self) -> dict[str, str]:
        """Name of each picture -> its prompt."""
        n = self.images_per_prompt
        return {f"{i:04d}_{k:04d}.png": t for i, t in enumerate(self.texts) for k in range(n)}

    def said(self) -> dict[str, str]:
        """All options, and what they come to."""
        return {
            k: str(v)
            for k, v in {**as_dict(self), "texts": self.texts, "forgotten": self.forgotten}.items()
        }

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "num_inference_steps", "sample_batch_size",
                     "noise_images"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1; got {getattr(self, name)}")
        self.check_nudity()
        if self.half and not torch.cuda.is_available():
            raise InputError("--half draws in float16, which needs a GPU; leave it out")
        _check_prompts(self)
        _check_metrics(self)
        folder = self.reference_dir
        if folder and not (folder / RESULT).is_file():
            raise InputError(f"--reference_dir {folder} holds no {RESULT} of this script")
        if "lpips" in self.metrics:
            _check_reference(self)
        if (self.output_dir / RESULT).exists() and not self.overwrite:
            raise InputError(
                f"--output_dir {self.output_dir} holds a finished evaluation: delete its {RESULT} "
                "to measure the same pictures anew, give --overwrite to draw anew too, or another "
                "folder"
            )


def _check_prompts(args: Evaluation) -> None:
    if bool(args.prompts) == args.imagenette:
        raise InputError("give either --prompts or --imagenette")
    if args.template.count("{}") != 1:
        raise InputError(f'--template needs one "{{}}"; got {args.template!r}')
    for given, text in zip(args.forget, args.forgotten, strict=True):
        if text not in args.texts:
            what = f"there is {', '.join(CLASSES)}" if args.imagenette else "it is none of them"
            raise InputError(f"--forget {given!r} is to be one of the prompts: {what}")


def _check_metrics(args: Evaluation) -> None:
    if "imagenette" in args.metrics and not (args.imagenette and args.forget):
        raise InputError("--metrics imagenette judges pictures of --imagenette, with a --forget")
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
            raise InputError("--metrics fid needs two pictures or more: give --images_per_prompt 2")
        assert args.real_images
        try:
            RGBImages(args.real_images, "--real_images", least=2)
        except ValueError as error:
            raise InputError(str(error)) from error


def _check_reference(args: Evaluation) -> None:
    """That its pictures pair up with those which are to be drawn."""
    assert args.reference_dir
    reference = json.loads((args.reference_dir / RESULT).read_text())
    before = reference["protocol"]["options"]
    for name in SAME:  # or the distance would be that of other noise
        if before[name] != str(getattr(args, name)):
            raise InputError(
                f"--reference_dir {args.reference_dir} was drawn with --{name} {before[name]}, "
                f"not {getattr(args, name)}: measure the base with the same options"
            )
    if reference["images"] != args.files:
        raise InputError(
            f"--reference_dir {args.reference_dir} is of other prompts or of another number of "
            "pictures: measure the base with the same options"
        )


def draw(args: Evaluation, looked: pipelines.Looked, wanted: dict[str, str], folder: Path) -> None:
    """PNG files into `folder`, those that are missing."""
    missing = [name for name in wanted if not (folder / name).exists()]
    if not missing:
        return
    pipe = drawing.ready(
        results.load(args, args.base_model),
        torch.float16 if args.half else torch.float32,
    )
    seeds = [args.seed + int(Path(name).stem.split("_")[1]) for name in missing]
    pictures = drawing.draw(
        pipe, [wanted[name] for name in missing], seeds, batch=args.sample_batch_size,
        num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        height=looked.resolution, width=looked.resolution,
    )  # fmt: skip
    for name, x in zip(missing, pictures, strict=True):
        if not x.isfinite().all():  # as uint8 it would be black, and seem to be forgotten
            raise InputError(
                f"{args.pretrained_model_name_or_path} draws NaN: its weights have diverged"
                f"{', or float16 is too small for it: leave --half out' if args.half else ''}"
            )
        pixels = x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        with replacing(folder / name) as work:
            Image.fromarray(pixels.contiguous().numpy()).save(work)


def measure(args: Evaluation, drawn: dict[str, str], folder: Path) -> dict[str, Any]:
    """Values by their keys in a report, and every metric's own protocol."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # of the metrics that need them
    reference, real = args.reference_dir or Path(), args.real_images or Path()
    gone = [n for n in drawn if drawn[n] in args.forgotten]
    kept = [n for n in drawn if drawn[n] not in args.forgotten]

    def pixels(names: Sequence[str]) -> torch.Tensor:
        return torch.stack([read_image(folder / n) for n in names])

    def lpips() -> dict[str, Any]:
        found = lpips_distance(
            folder, reference / "images", net=args.lpips_net,
            weights_file=args.alexnet_weights, device=device,
        )  # fmt: skip
        each = dict(zip(sorted(drawn), found["per_image"] or ()))  # folders are read by name
        for key, part in (("lpips_f", gone), ("lpips_r", kept)):
            if part:
                d = torch.tensor([each[n] for n in part]) if each else None
                found[key] = None if d is None else estimate(d, seed=args.seed)
        return found

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "imagenette": lambda: imagenette_metrics(
            pixels(list(drawn)), [args.texts.index(t) for t in drawn.values()], args.forget,
            over=args.over, weights_file=args.resnet_weights, noise_images=args.noise_images,
            seed=args.seed, device=device,
        ),
        "nudity": lambda: nudity_score(
            pixels(gone or kept), counting=args.nudity_counting, seed=args.seed,
            **args.nudity,
        ),
        "clip_score": lambda: clip_score(
            pixels(kept or gone), [drawn[n] for n in kept or gone], model=args.clip_model,
            pretrained=args.clip_weights, scale=args.clip_scale, device=device, seed=args.seed,
        ),
        "lpips": lpips,
        "fid": lambda: fid(
            pixels(kept or gone), real, reference_split=str(args.real_images),
            inception_weights=args.inception_weights, device=device,
        ),
    }  # fmt: skip
    values: dict[str, Any] = {}
    said: dict[str, Any] = {}
    for metric in dict.fromkeys(args.metrics):
        try:
            with called(**ARGUMENTS[metric]):
                found = measures[metric]()
        except ValueError as error:
            raise InputError(f"--metrics {metric}: {error}") from error
        why = found["not_computed"]
        values |= {
            k: {"not_computed": why} if why else found[k] for k in KNOWN[metric] if k in found
        }
        said[metric] = found["protocol"]
    return {"values": values, "metrics": said}


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(Evaluation, argv, __doc__)
    looked, out = pipelines.look(results.whole(args, args.base_model)), args.output_dir
    identity = {
        k: v for k, v in args.said().items()
        if k in ("pretrained_model_name_or_path", "base_model", "revision", "variant", "texts",
                 "resolution", "images_per_prompt", "num_inference_steps", "guidance_scale", "seed",
                 "half")
    }  # fmt: skip
    with results.held(out):
        mark, folder = out / "drawn.json", out / "images"
        before = json.loads(mark.read_text()) if mark.exists() else None
        ours = before == identity or (before is not None and args.overwrite)
        if folder.exists() and not ours:
            raise InputError(
                f"--output_dir {out} holds pictures of other options: give another folder"
                f"{', or --overwrite' if before else ''}"
            )
        if args.overwrite:
            (out / RESULT).unlink(missing_ok=True)
            for name in folder.glob("*_*.png"):
                name.unlink()
        with replacing(mark) as work:
            work.write_text(json.dumps(identity))
        drawn = args.files
        draw(args, looked, drawn, folder)
        found = measure(args, drawn, folder)
        said = {"options": args.said(), "versions": versions()}
        with replacing(out / RESULT) as work:
            work.write_text(json.dumps({**found, "images": drawn, "protocol": said}, indent=1))
    for key, value in found["values"].items():
        print(f"{key}: {json.dumps(value)}")
    print(f"saved {out / RESULT}")
