"""Make a class-conditional diffusion model forget classes, by EBU or by what it is compared with.

    python examples/ddpm/unlearn.py --pretrained_model_name_or_path outputs/digits \\
        --prepared_dir outputs/digits_forget_0 --method ebu --output_dir outputs/digits_without_0

The paper's setting: 200 steps, Adam 1e-4 (its appendix also says 1e-5), clipping at 1.0, uniform
noise as what the class becomes, replayed pairs, losses summed over C, H, W.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebu_optim import training
from ebu_optim.baselines import SalUn, methods, reset_weights
from ebu_optim.class_conditional import sets as prepare
from ebu_optim.class_conditional.models import WEIGHTS, load_classifier, load_unet
from ebu_optim.class_conditional.outcome import draw, finish, measure, noise_p_f, pictures
from ebu_optim.diffusion import model_hash
from ebu_optim.diffusion import objectives as unlearn_losses
from ebu_optim.diffusion.objectives import Objectives, needs_own_images, needs_teacher
from ebu_optim.errors import InputError
from ebu_optim.modules import parameter_bytes
from ebu_optim.training import data
from ebu_optim.training import method as method_options
from ebu_optim.training.ema import Ema, averaged


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True)
    add("--prepared_dir", type=Path, required=True, help="made by prepare.py")
    add("--forget", nargs="+", help="classes, by number or name; default: as prepared")
    add("--replay_classes", nargs="+", help="default: as prepared")
    add("--surrogate", choices=("uniform", "gaussian", "analytic", "null_class"), default="uniform")
    add(
        "--remember_data", choices=("replay", "real"), help="default: real for retrain, else replay"
    )
    add("--start_from", choices=WEIGHTS, default="trained", help="that are trained and anchored")
    add("--use_ema", action="store_true", help="save the average of the weights as unet_ema too")
    add("--ema_decay", type=float, default=0.9999)
    add("--sample_weights", choices=WEIGHTS, default="trained", help="that the curve measures")
    add("--classifier", type=Path, help="for the curve: P_f and accuracy every --validation_steps")
    add(
        "--entropy_classifier", type=Path,
        help="for the curve's CE_f and CE_r, where --classifier has a reject class: there noise\n"
        "has no entropy; default: --classifier",
    )  # fmt: skip
    add("--validation_steps", type=int, default=25)
    add("--validation_images", type=int, default=20, help="of each class")
    add("--validation_inference_steps", type=int, default=20)
    add(
        "--validation_pictures", type=int, default=0,
        help="so many of each class go into pictures.safetensors every --validation_steps",
    )  # fmt: skip
    unlearn_losses.add_arguments(parser, "--remember")
    # SPM's adapter is for transformer blocks
    method_options.add_arguments(
        parser, ("ebu", *(m for m in methods if methods[m].forgets != "adapter")), "prepared"
    )
    data.add_arguments(parser)
    training.add_arguments(parser, max_train_steps=200, checkpointing_steps=100)
    args = parser.parse_args(argv)
    training.check(args)
    method_options.check(args, {"ebu": "ebu_added"})
    args.remember_data = args.remember_data or ("real" if args.method == "retrain" else "replay")
    if not 0 <= args.ema_decay < 1:
        raise InputError(f"--ema_decay must be in [0, 1); got {args.ema_decay}")
    for name in ("validation_steps", "validation_images", "validation_inference_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be >= 1; got {getattr(args, name)}")
    if not 0 <= args.validation_pictures <= args.validation_images:
        raise InputError(
            f"--validation_pictures must be 0 to --validation_images ({args.validation_images}), "
            f"from which they are taken; got {args.validation_pictures}"
        )
    if args.entropy_classifier and not args.classifier:
        raise InputError("--entropy_classifier needs --classifier, which measures P_f and RA")
    unlearn_losses.check(args)
    if args.sample_weights == "ema" and not args.use_ema:
        raise InputError("--sample_weights ema needs --use_ema")
    return args


def build(args: argparse.Namespace, model: Any, fisher: Any) -> Any:
    """The method's optimizer over the model, from the table of ebu_optim.baselines."""
    source = method_options.fisher_source(args, "prepared")
    if source == "prepared" and fisher is None:
        raise InputError(f"{args.prepared_dir} holds no Fisher: run prepare.py without --no_fisher")
    kinds = {"online": "online", "prepared": fisher and fisher.for_model(model)}
    trained = model
    if args.method == "embedding_only":
        trained, _ = model.class_embedding, model.requires_grad_(False)
        trained.requires_grad_(True)
    return method_options.build(args, trained.parameters(), kinds.get(source))


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(argv)
    raw, scheduler, info = load_unet(args.pretrained_model_name_or_path, args.start_from)
    classes, base_hash = info["classes"], model_hash(raw)
    made = prepare.read(args.prepared_dir, base_hash, args, classes)
    if (why := needs_own_images(args)) and made.own is None:
        raise InputError(
            f"{why} needs real images of every class to forget: run prepare.py with a data set"
        )
    if args.surrogate == "null_class" and made.surrogate is None:
        raise InputError("--surrogate null_class: run prepare.py with --surrogate_images")
    kept = None
    if args.remember_data == "real":
        real = data.load_for(args, info).only(made.replayed)
        kept = real.images, real.labels
    judge, plain = (
        load_classifier(path, classes)[0] if path else None
        for path in (args.classifier, args.entropy_classifier or args.classifier)
    )
    average = start_of_average(args, raw) if args.use_ema else None
    teacher = copy.deepcopy(raw).eval() if needs_teacher(args) else None
    accelerator = training.new_accelerator(args)
    opt = build(args, raw, made.fisher)
    size, same = parameter_bytes(raw), {"model": base_hash}
    with training.Run(args, accelerator, "unlearn", size=size, same=same) as run:
        device = accelerator.device
        teacher = teacher and teacher.to(device)
        if args.method == "retrain":
            reset_weights(raw, args.seed)
        schedule = training.new_schedule(args, opt)
        model, optimizer = accelerator.prepare(raw.train(), opt)
        ema = Ema(average, args.ema_decay, warm=True) if average else None
        if ema:
            ema.model.to(device)
        done: dict[str, Any] = {"seconds": 0.0, "curve": [], "pictures": {}}
        objects = {"model": raw, "optimizer": opt, "schedule": schedule, "done": done}
        losses = Objectives(
            args, made, model, raw, teacher, scheduler, accelerator, info["shape"], kept
        )
        begin = run.resume({**objects, "ema": ema} if ema else objects)
        say(accelerator, args, made, classes, ema)
        if isinstance(opt, SalUn) and not begin:
            opt.make_mask(losses.for_mask())

        def look(step: int) -> None:
            if (judge or args.validation_pictures) and accelerator.is_main_process:
                chosen = ema if args.sample_weights == "ema" else None
                with averaged(raw, chosen):
                    drawn = draw(args, raw.eval(), scheduler, info)
                if judge:
                    row = measure(judge.to(device), plain.to(device), *drawn, made)
                    done["curve"].append({"step": step, "seconds": done["seconds"], **row})
                if args.validation_pictures:
                    done["pictures"][f"step_{step:08d}"] = pictures(args, *drawn)
            raw.train()
            accelerator.wait_for_everyone()

        if not begin:
            look(0)
        for step in run.steps(begin, f"forgetting {', '.join(classes[c] for c in made.forget)}"):
            start = time.perf_counter()
            said = training.unlearning_step(accelerator, model, opt, optimizer, losses, step)
            schedule.step()
            if ema:
                ema.step(raw.parameters())
            done["seconds"] += time.perf_counter() - start
            if step % args.logging_steps == 0:
                run.log(step, **training.figures(said, opt))
            if step % args.validation_steps == 0 or step == args.max_train_steps:
                look(step)
        if accelerator.is_main_process:
            done["noise_p_f"] = judge and noise_p_f(judge, made.forget, info["shape"])
            finish(args, raw, scheduler, info, made, done, ema, base_hash, opt)
        accelerator.wait_for_everyone()


def start_of_average(args: argparse.Namespace, raw: Any) -> list[Tensor]:
    """Where the average starts: at the base's own where it has one, as in the DDPM code base."""
    try:
        other, _, _ = load_unet(args.pretrained_model_name_or_path, "ema")
    except InputError:
        other = raw
    return [p.detach().clone() for p in other.parameters()]


def say(accelerator: Any, args: argparse.Namespace, made: Any, classes: list, ema: Any) -> None:
    """Which classes and which weights; a warning where an average will hide the forgetting."""
    accelerator.print(
        f"{methods[args.method].title}: forgets {', '.join(classes[c] for c in made.forget)}, "
        f"replays {', '.join(classes[c] for c in made.replayed)}; "
        f"{accelerator.num_processes} process(es) on {accelerator.device}\n"
        f"weights: trained and anchored {WEIGHTS[args.start_from]} of the base; measured "
        f"{WEIGHTS[args.sample_weights]}; saved unet{' and unet_ema' if ema else ''}"
    )
    lag = args.ema_decay**args.max_train_steps
    if ema and lag > 0.05:
        accelerator.print(
            f"warning: after {args.max_train_steps} steps the average (decay {args.ema_decay}) "
            f"still holds {lag:.0%} of the weights before unlearning: unet_ema will seem not to "
            "have forgotten. Sample unet, or give a smaller --ema_decay"
        )


if __name__ == "__main__":
    training.exit_on_input_errors(main)
