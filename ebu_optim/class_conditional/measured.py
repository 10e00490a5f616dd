"""What evaluate.py measures of a model: its images, their quality, and its depth; all cached."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..diffusion import model_hash, sample, sample_set
from ..diffusion.sampling import scheduler_protocol
from ..errors import InputError
from ..files import load_tensors, need_disk, replacing, save_tensors
from ..manifest import key, of_model
from ..metrics import classify, fid, inversion, probability, relearn_steps
from ..metrics.frechet import classifier_features, distance_of, moments
from ..report import fid_values
from ..training import data

if TYPE_CHECKING:
    from .evaluation import Evaluation


def guidance(args: Evaluation, info: dict) -> dict[str, Any]:
    """Return the guidance of every image, those of an attacked model included."""
    if args.guidance_scale == 1:
        return {}
    return {"guidance_scale": args.guidance_scale, "null_condition": info["null_class"]}


def draw(args: Evaluation, model: Any, scheduler: Any, labels: Tensor, info: dict) -> Tensor:
    """Return images of every class, with the same starting noise for every model; cached."""
    folder = args.samples
    need_disk(folder, 8 * len(labels) * torch.Size(info["shape"]).numel(), "the samples")
    try:
        images, _ = sample_set(
            folder / f"{model_hash(model)}.safetensors",
            model,
            DDIMScheduler.from_config(scheduler.config),
            labels,
            tuple(info["shape"]),
            num_inference_steps=args.num_inference_steps,
            **guidance(args, info),
            batch_size=args.sample_batch_size,
            seed=args.seed,
            device=args.device,
        )
    except ValueError as error:  # the file was sampled with other options
        raise InputError(str(error)) from error
    return images


def quality(
    args: Evaluation,
    judge: Any,
    images: Tensor,
    labels: Tensor,
    kept: Tensor,
    forget: list[int],
    real: data.Data,
) -> dict[str, Any]:
    """Return the distances of the kept classes to the real images of these classes."""
    ours = moments(classifier_features(judge, images[kept]))
    frechet = distance_of(ours, reference_moments(args, judge, forget, real))
    found: dict[str, Any] = {"classifier_frechet": frechet}
    if args.fid:
        found |= fid_values(
            fid(
                images,
                real.images,
                reference_split=real.source,
                labels=labels,
                reference_labels=real.labels,
                forget=forget,
                inception_weights=args.inception_weights,
                device=args.device,
            )
        )
    return found


def reference_moments(
    args: Evaluation, judge: Any, forget: list[int], real: data.Data
) -> tuple[Tensor, Tensor]:
    """Return the moments of the judge's features of the kept classes' real images, cached.

    A pass of the judge over all real images can take longer than sampling the model."""
    said = key([of_model(judge), real.made_of(), forget])
    path = args.samples / f"moments-{said}.safetensors"
    if not path.exists():
        theirs = real.images[~torch.isin(real.labels, torch.tensor(forget))]
        mean, covariance = moments(classifier_features(judge, data.to_float(theirs)))
        save_tensors(path, {"mean": mean, "covariance": covariance}, {"of": said})
    found, _ = load_tensors(path)
    return found["mean"], found["covariance"]


def depth(
    args: Evaluation,
    model: Any,
    scheduler: Any,
    forget: list[int],
    real: data.Data,
    judge: Any,
    info: dict,
    relearn: bool = True,
) -> dict[str, Any]:
    """Return P_f after inversion (mean over the classes), and the relearning steps per class.

    An attacker samples as everybody does: with the evaluation's guidance."""
    inverted, found = [], {}
    for c in forget:
        images = data.to_float(real.only([c]).images)
        if not len(images):
            raise InputError(
                f"{real.source} has no image of {info['classes'][c]} to attack with; give a "
                "data set that has one"
            )

        def p_f(attacked: Any, c: int = c) -> float:
            drawn = sample(
                attacked.eval(),
                DDIMScheduler.from_config(scheduler.config),
                torch.full((args.attack_images,), c),
                tuple(info["shape"]),
                num_inference_steps=args.num_inference_steps,
                **guidance(args, info),
                device=args.device,
                generator=torch.Generator().manual_seed(args.seed + 2),
            )
            return probability(classify(judge, drawn), c)

        options: dict[str, Any] = {"seed": args.seed}
        inverted.append(
            inversion(
                model,
                model.class_embedding,
                images,
                scheduler,
                p_f,
                at=args.inversion_steps,
                null=info["null_class"],
                **options,
            )
        )
        if relearn and args.relearn_max_steps:
            key = "relearn_steps" if len(forget) == 1 else f"relearn_steps {info['classes'][c]}"
            found[key] = relearn_steps(
                model, images, c, scheduler, p_f, max_steps=args.relearn_max_steps, **options
            )
    mean = {k: sum(row[k] for row in inverted) / len(inverted) for k in inverted[0]}
    return {**mean, **found}


def depth_of_base(args: Evaluation, base: Any, *rest: Any) -> dict[str, Any]:
    """Return inversion of the base model, cached under everything that it depends on."""
    scheduler, forget, real, judge, info = rest
    said = [
        of_model(base),
        of_model(judge),
        scheduler_protocol(scheduler),
        real.made_of(),
        forget,
        args.seed,
        args.attack_images,
        args.inversion_steps,
        args.num_inference_steps,
        guidance(args, info),
        args.device,
    ]
    path = args.samples / f"{key(said)}.json"
    if not path.exists():
        found = depth(args, base, scheduler, forget, real, judge, info, relearn=False)
        with replacing(path) as work:
            work.write_text(json.dumps({"of": said, "found": found}, indent=1))
    return json.loads(path.read_text())["found"]
