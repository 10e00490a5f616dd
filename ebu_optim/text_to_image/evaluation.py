"""Generate images of prompts with a text-to-image pipeline, from fixed noise, and measure them.

    python examples/stable_diffusion/evaluate.py \\
        --pretrained_model_name_or_path outputs/without_cassette_player/pipeline \\
        --imagenette --forget "cassette player" --reference_dir outputs/base_evaluated \\
        --metrics imagenette clip_score lpips --output_dir outputs/evaluated

--reference_dir is the output of the same command for the base model, without lpips.
Image i of a prompt starts from the noise of seed + i, before and after unlearning. The images
are in output_dir/images, the figures in output_dir/evaluation.json. A metric whose weights are not
available is "not computed", with the reason. A run that was interrupted generates only the images
that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import replacing
from ..manifest import changed
from ..metrics import (
    clip_score,
    fid,
    imagenette_metrics,
    lpips_distance,
    nudity_score,
    versions,
)
from ..metrics.imagenette import METRICS
from ..metrics.images import read_image
from ..metrics.intervals import estimate
from ..metrics.naming import called
from . import drawing, pipelines, results
from .evaluation_options import RESULT, Evaluation
from .prompt_files import Row
from .prompts import check_lengths

#: The figures of each metric, by their names in a report.
KNOWN = {
    "imagenette": METRICS,
    "nudity": ("nudity_score",),
    "clip_score": ("clip_score",),
    "lpips": ("lpips_f", "lpips_r"),
    "fid": ("fid", "kid_mean"),
}
#: Argument of a metric's function -> the option of this script that messages name instead.
ARGUMENTS = {
    "imagenette": {"weights_file": "--resnet_weights"},
    "nudity": {},
    "clip_score": {"pretrained": "--clip_weights", "model": "--clip_model"},
    "lpips": {"weights_file": "--alexnet_weights", "reference": "--reference_dir"},
    "fid": {"inception_weights": "--inception_weights", "reference": "--real_images"},
}


def draw(args: Evaluation, looked: pipelines.Looked, wanted: dict[str, Row], folder: Path) -> None:
    """Generate the PNG files that `folder` lacks, one guidance scale after the other."""
    missing = [name for name in wanted if not (folder / name).exists()]
    if not missing:
        return
    pipe, size = results.load(args, args.base_model), looked.resolution
    beside = looked.family.drawing(pipe, size)  # while the VAE is in float32
    pipe = drawing.ready(pipe, torch.float16 if args.half else torch.float32)
    by_guidance: dict[Any, list[str]] = {}
    for name in missing:
        by_guidance.setdefault(wanted[name].guidance, []).append(name)
    pictures = (
        (name, x)
        for guidance, names in by_guidance.items()
        for name, x in zip(
            names,
            drawing.draw(
                pipe,
                [wanted[n].prompt for n in names],
                [wanted[n].seed or 0 for n in names],
                batch=args.sample_batch_size,
                num_inference_steps=args.num_inference_steps,
                height=size,
                width=size,
                **looked.family.guiding(guidance),
                **beside,
            ),
            strict=True,
        )
    )
    for name, x in pictures:
        remedy = ", or float16 overflows: leave --half out" if args.half else ""
        drawing.save(x, folder / name, args.pretrained_model_name_or_path, remedy)


def measure(args: Evaluation, drawn: dict[str, str], folder: Path) -> dict[str, Any]:
    """The values by their keys in a report, and the protocol of every metric."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # only the metrics that need these read them
    reference, real = args.reference_dir or Path(), args.real_images or Path()
    gone = [n for n in drawn if drawn[n] in args.forgotten]
    kept = [n for n in drawn if drawn[n] not in args.forgotten]

    def pixels(names: Sequence[str]) -> torch.Tensor:
        return torch.stack([read_image(folder / n) for n in names])

    def lpips() -> dict[str, Any]:
        found = lpips_distance(
            folder,
            reference / "images",
            net=args.lpips_net,
            weights_file=args.alexnet_weights,
            device=device,
        )
        each = dict(zip(sorted(drawn), found["per_image"] or ()))  # folders are read by name
        for key, part in (("lpips_f", gone), ("lpips_r", kept)):
            if part:
                d = torch.tensor([each[n] for n in part]) if each else None
                found[key] = None if d is None else estimate(d, seed=args.seed)
        return found

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "imagenette": lambda: imagenette_metrics(
            pixels(list(drawn)),
            [args.texts.index(t) for t in drawn.values()],
            args.forget,
            over=args.over,
            weights_file=args.resnet_weights,
            noise_images=args.noise_images,
            seed=args.seed,
            device=device,
        ),
        "nudity": lambda: nudity_score(
            pixels(gone or kept),
            counting=args.nudity_counting,
            seed=args.seed,
            **args.nudity,
        ),
        "clip_score": lambda: clip_score(
            pixels(kept or gone),
            [drawn[n] for n in kept or gone],
            model=args.clip_model,
            pretrained=args.clip_weights,
            scale=args.clip_scale,
            device=device,
            seed=args.seed,
        ),
        "lpips": lpips,
        "fid": lambda: fid(
            pixels(kept or gone),
            real,
            reference_split=str(args.real_images),
            inception_weights=args.inception_weights,
            device=device,
        ),
    }
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


def evaluate(args: Evaluation) -> None:
    """Generate and measure the images, and write the results to ``args.output_dir``.

    Raises:
        InputError: the pipeline, the prompts, the metrics or the output folder do not fit.
    """
    looked, out = pipelines.look(results.whole(args, args.base_model)), args.output_dir
    args = looked.family.guided(args, looked.unet)
    looked.family.check_steps(args, looked.scheduler, "num_inference_steps")
    if not args.truncate:
        check_lengths(args.texts, looked.tokenizer, "or give --truncate")
    identity = {
        k: v
        for k, v in args.said().items()
        if k
        in (
            "pretrained_model_name_or_path",
            "base_model",
            "revision",
            "variant",
            "texts",
            "resolution",
            "images_per_prompt",
            "num_inference_steps",
            "guidance_scale",
            "seed",
            "half",
        )
    }
    identity |= results.made_of(args, args.base_model)
    with results.held(out):
        mark, folder = out / "drawn.json", out / "images"
        before = json.loads(mark.read_text()) if mark.exists() else None
        ours = before == identity or (before is not None and args.overwrite)
        if folder.exists() and not ours:
            others = f" ({', '.join(changed(before, identity))})" if before else ""
            raise InputError(
                f"--output_dir {out} holds images of other options{others}: give another folder"
                f"{', or --overwrite' if before else ''}"
            )
        if args.overwrite:
            (out / RESULT).unlink(missing_ok=True)
            for name in folder.glob("*_*.png"):
                name.unlink()
        with replacing(mark) as work:
            work.write_text(json.dumps(identity))
        drawn = args.files
        draw(args, looked, args.drawn, folder)
        found = measure(args, drawn, folder)
        said = {"options": args.said(), "drawn": identity, "versions": versions()}
        with replacing(out / RESULT) as work:
            work.write_text(json.dumps({**found, "images": drawn, "protocol": said}, indent=1))
    for key, value in found["values"].items():
        print(f"{key}: {json.dumps(value)}")
    print(f"saved {out / RESULT}")
