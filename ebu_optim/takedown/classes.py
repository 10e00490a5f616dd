"""A request for a class-conditional model: sets, unlearning, report and evidence in one run."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..class_conditional import evaluation, sets
from ..class_conditional.options import Unlearn
from ..class_conditional.unlearn import unlearn
from ..diffusion.objectives import needs_own_images
from ..errors import InputError
from ..files import replacing
from ..training.fields import as_yaml, option
from ..training.sources import DataOptions
from . import evidence
from .pictures import FOLDER

MARK = "classes.json"  # every folder of a class-conditional model contains this file


@dataclass(frozen=True, kw_only=True)
class ForgetClasses(Unlearn):
    """A request for a model whose conditions are classes.

    Raises:
        InputError: a value is out of range, or two options exclude each other.
    """

    pretrained_model_name_or_path: str = option(
        positional="MODEL", help=f"A folder with {MARK}, as examples/ddpm/train.py writes it."
    )
    forget: list[str] = option(positional="CLASS", help="Classes to forget, by number or name.")
    replay_classes: list[str] | None = option(
        None, flag="--keep", help="Classes that must stay. Default: all others."
    )
    output_dir: Path = option(
        flag=("-o", "--output_dir"), help="Folder for the result and its evidence."
    )
    prepared_dir: Path | None = option(
        None, help="Folder for the sets. Default: sets in the output folder."
    )  # type: ignore[assignment]
    replay_per_class: int = option(500, help="Images to generate of each class that is kept.")
    sampling_steps: int = option(50, help="DDIM steps for these images.")
    guidance_scale: float = option(3.0, help="Guidance scale for these images.")
    plan: bool = option(False, help="Print what the run would do, and do nothing.")
    sign_key: Path | None = option(
        None, help="Sign the evidence with this private key (PEM, elliptic curve)."
    )

    def resolved(self) -> ForgetClasses:
        """A copy with the defaults that depend on other options; `self` if none is missing."""
        whole = self
        if self.prepared_dir is None:
            whole = replace(
                self, prepared_dir=self.output_dir.with_name(f"{self.output_dir.name}_sets")
            )
        return super(ForgetClasses, whole).resolved()  # type: ignore[return-value]


def run(config: ForgetClasses) -> None:
    """Prepare the missing sets, unlearn, measure if a classifier is given, and write the evidence.

    Raises:
        InputError: the forget loss or the classifier needs real images, and no data set is given.
    """
    args: Any = config.resolved()
    why = needs_own_images(args) or ("--classifier" if args.classifier else None)
    if why and not args.given:
        raise InputError(
            f"{why} needs real images: give --digits, --dataset_name, --parquet or --train_data_dir"
        )
    shared = {f.name: getattr(args, f.name) for f in fields(DataOptions)}
    shared |= {"device": "cpu"} if args.cpu else {}
    prepare = sets.Prepare(
        **shared,
        weights=args.start_from,
        surrogate_images=args.replay_per_class * (args.surrogate == "null_class"),
        pretrained_model_name_or_path=args.pretrained_model_name_or_path,
        forget=args.forget,
        replay_classes=args.replay_classes,
        replay_per_class=args.replay_per_class,
        num_inference_steps=args.sampling_steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        output_dir=args.prepared_dir,
        no_fisher=args.fisher != "prepared",
        fisher_reduction=args.reduction,
    )
    if args.plan:
        print(_plan(args))
        return
    sets.prepare(prepare)
    unlearn(args)
    with replacing(args.output_dir / evidence.CONFIG) as work:
        work.write_text(as_yaml(config), encoding="utf-8")
    if args.classifier:
        evaluation.evaluate(
            evaluation.Evaluation(
                **shared,
                pretrained_model_name_or_path=str(args.output_dir),
                classifier=args.classifier,
                output_dir=args.output_dir / FOLDER,
                num_inference_steps=args.sampling_steps,
                no_depth=True,
                images_per_class=min(100, args.replay_per_class),
            )
        )
    else:
        print(
            "no --classifier: nothing was measured, the folder holds only the model and its curve"
        )
    print(f"evidence: {evidence.write(args)}; check it with `ebu verify`")


def _plan(args: Any) -> str:
    from ..class_conditional.models import load_unet
    from ..modules import parameter_bytes

    model, _, info = load_unet(args.pretrained_model_name_or_path, args.start_from)
    classes = info["classes"]
    known = {*classes, *map(str, range(len(classes)))}
    if unknown := [c for c in args.forget if c not in known]:
        raise InputError(
            f"CLASS {unknown[0]}: the model has no such class; give one of {', '.join(classes)}"
        )
    kept = len(args.replay_classes or classes) - len(args.forget) * (not args.replay_classes)
    passes = kept * args.replay_per_class * args.sampling_steps * 2
    return (
        f"model: {args.pretrained_model_name_or_path}, {len(classes)} classes, "
        f"{parameter_bytes(model) / 2**20:.1f} MiB\n"
        f"sets in {args.prepared_dir}: {passes:,} passes through the model, unless they exist\n"
        f"unlearning: {args.method}, {args.max_train_steps} steps of batch {args.train_batch_size}"
        f"\nwritten to {args.output_dir}: unet, README.md, unlearn.json, {evidence.FILE}, run.yaml"
    )
