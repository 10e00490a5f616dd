"""Evaluate the result of unlearn.py: forgotten, kept, deep, and how long it took.

    python examples/ddpm/evaluate.py --pretrained_model_name_or_path outputs/digits_without_0 \\
        --classifier outputs/classifier --reject_classifier outputs/classifier_reject --digits \\
        --output_dir outputs/digits_without_0_report

Writes results.json, results.md, report.html and image grids. Every figure is shown with those of
the base model and of noise, and the protocol is complete. Samples are kept in <output_dir>.samples
under the hash of the model, so an interrupted evaluation can be continued, and the base model is
sampled once.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..diffusion import model_hash
from ..errors import InputError
from ..metrics import accuracy, classifier_metrics, classify, unlearn_steps
from ..report import check_folder, limit_rows, write_report
from ..training import data
from ..training.fields import at_least, flags, option
from ..training.options import ddim_takes
from ..training.sources import DataOptions
from .measured import depth, depth_of_base, draw, quality
from .models import Weights, load_classifier, load_unet
from .pages import curves, grid, protocol


@dataclass(frozen=True, kw_only=True)
class Evaluation(DataOptions):
    """What is measured, and how.

    Raises:
        InputError: a number is out of range.
    """

    pretrained_model_name_or_path: str = option(help="Folder that unlearn.py made.")
    weights: Weights = option(
        "trained", help="Which weights sample: the trained ones, or their average."
    )
    base_model: str | None = option(
        None, help="The model before unlearning. Default: the one that unlearn.py was given."
    )
    classifier: Path = option(help="Folder of the classifier that train_classifier.py made.")
    reject_classifier: Path | None = option(
        None, help="Folder of a classifier that was trained with --reject, for P_f and the attacks."
    )
    images_per_class: int = option(500, help="Images of each class.")
    num_inference_steps: int = option(50, help="DDIM steps of each image, with eta 0.")
    guidance_scale: float = option(
        1.0, help="Guidance of each image; 1 uses only the conditional model."
    )
    sample_batch_size: int = option(128, help="Images that are sampled at once.")
    no_depth: bool = option(False, help="Leave out both attacks.")
    inversion_steps: list[int] = option(
        [100, 200], help="Steps of inversion after which P_f is measured."
    )
    relearn_max_steps: int = option(
        100, help="Steps of relearning at most; 0 leaves this attack out."
    )
    attack_images: int = option(50, help="Images on which an attacked model is measured.")
    fid: bool = option(False, help="Compute FID and KID by torch-fidelity.")
    inception_weights: Path | None = option(
        None, help="File of torch-fidelity's Inception weights. Default: it is downloaded."
    )
    seed: int = option(1, help="Seed of the images and of the attacks.")
    device: str = option(
        "cuda" if torch.cuda.is_available() else "cpu",
        help="Where the images are sampled: cpu, cuda, cuda:1, ...",
    )
    output_dir: Path = option(help="Folder for the report.")
    samples_dir: Path | None = option(
        None,
        help="Folder in which images and attacks are kept; reports that share it sample and "
        "attack their base once. Default: <output_dir>.samples.",
    )
    overwrite_output_dir: bool = option(False, help="Replace an older report.")

    @property
    def samples(self) -> Path:
        """The folder in which samples are kept."""
        return self.samples_dir or self.output_dir.with_name(self.output_dir.name + ".samples")

    def __post_init__(self) -> None:
        at_least(self, 1, "images_per_class", "num_inference_steps", "attack_images")


def evaluate(args: Evaluation) -> None:
    """Measure the model and write the report to ``args.output_dir``.

    Raises:
        InputError: options, models or data do not fit.
    """
    if args.inception_weights and not args.inception_weights.is_file():
        raise InputError(f"--inception_weights {args.inception_weights}: there is no such file")
    try:  # checked before the hours of sampling
        check_folder(args.output_dir, args.overwrite_output_dir)
    except FileExistsError as error:
        raise InputError(f"--output_dir {error} (--overwrite_output_dir)") from error
    model, scheduler, info = load_unet(args.pretrained_model_name_or_path, args.weights)
    ddim_takes(args, scheduler, "num_inference_steps")
    made = unlearned(Path(args.pretrained_model_name_or_path))
    base, _, base_info = load_unet(args.base_model or made["base"], made["start_from"])
    if model_hash(base) != made["base_hash"]:
        raise InputError(
            f"{args.base_model or made['base']} is not the model that was unlearned (hash "
            f"{model_hash(base)}, unlearn.json says {made['base_hash']})"
        )
    classes, forget = info["classes"], made["forget"]
    judge, judged = load_classifier(args.classifier, classes)
    reject = None
    if args.reject_classifier:
        reject, reject_info = load_classifier(args.reject_classifier, classes)
        if not reject_info["reject"]:
            raise InputError(
                f"--reject_classifier {args.reject_classifier} has no reject class; give one "
                "that was trained with --reject"
            )
    real = data.load_for(args, info)
    place = torch.device(args.device)
    model, base, judge = model.to(place).eval(), base.to(place).eval(), judge.to(place)
    reject = reject and reject.to(place)

    labels = torch.arange(len(classes)).repeat_interleave(args.images_per_class)
    after = draw(args, model, scheduler, labels, info)
    before = draw(args, base, scheduler, labels, base_info)
    table = classifier_metrics(
        judge,
        after,
        labels,
        forget,
        reject=reject,
        base_images=before,
        num_classes=len(classes) + judged["reject"],
    )
    limits = {row["name"]: row["values"] for row in limit_rows(table)}
    values: dict[str, Any] = dict(table)
    kept = ~torch.isin(labels, torch.tensor(forget))
    for row, images in ((values, after), (limits["base model"], before)):
        row |= quality(args, judge, images, labels, kept, forget, real)
        never = kept & ~torch.isin(labels, torch.tensor(made["replayed"]))
        if never.any():
            row["ra_never_replayed"] = accuracy(classify(judge, images[never]), labels[never])
    if made["curve"]:
        start, noise = made["curve"][0]["p_f"], made["noise_p_f"]
        speed: Any = {"not_computed": "noise scores no less than the base model"}
        if noise < start:
            speed = unlearn_steps(made["curve"], base=start, level=noise)
        values["unlearn_steps"] = values["ut"] = speed
    if not args.no_depth:
        attacked = reject or judge
        values |= depth(args, model, scheduler, forget, real, attacked, info)
        limits["base model"] |= depth_of_base(args, base, scheduler, forget, real, attacked, info)
    info = {**info, "parameters": sum(p.numel() for p in model.parameters())}
    said, parts = protocol(args, info, made, judged, table, real)
    page = write_report(
        args.output_dir,
        title=f"{real.source.split(',')[0]} without {', '.join(classes[c] for c in forget)}",
        rows=[{"name": name, "values": v} for name, v in limits.items()]
        + [{"name": made["title"], "values": values}],
        protocol=said,
        parts=parts,
        curves=curves(made),
        grids=[grid(before, after, classes, forget, args.images_per_class)],
        notes=[f"{len(real.skipped)} images could not be read and were left out"]
        if real.skipped
        else [],
        command=shlex.join(["python", "examples/ddpm/evaluate.py", *flags(args)]),
        overwrite=args.overwrite_output_dir,
    )
    print((args.output_dir / "results.md").read_text().split("\n## ")[0])
    print(f"\nsee {page}")


def unlearned(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "unlearn.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} was not made by unlearn.py: {error}") from error
