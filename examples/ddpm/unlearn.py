"""Make a class-conditional diffusion model forget classes, by EBU or by what it is compared with.

    python examples/ddpm/unlearn.py --pretrained_model_name_or_path outputs/digits \\
        --prepared_dir outputs/digits_forget_0 --method ebu --output_dir outputs/digits_without_0

The paper's setting: 200 steps, Adam 1e-4 (its appendix also says 1e-5), clipping at 1.0, uniform
noise as what the class becomes, replayed pairs, losses summed over C, H, W.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

from ebu_optim import training
from ebu_optim.baselines import SalUn, reset_weights
from ebu_optim.class_conditional import sets
from ebu_optim.class_conditional.models import load_classifier, load_unet, start_of_average
from ebu_optim.class_conditional.options import Unlearn
from ebu_optim.class_conditional.outcome import (
    build,
    draw,
    finish,
    measure,
    noise_p_f,
    pictures,
    say,
)
from ebu_optim.diffusion import model_hash
from ebu_optim.diffusion.objectives import Objectives, needs_own_images, needs_teacher
from ebu_optim.errors import InputError
from ebu_optim.modules import parameter_bytes
from ebu_optim.training import data
from ebu_optim.training.ema import Ema, averaged
from ebu_optim.training.options import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(Unlearn, argv, __doc__).resolved()
    raw, scheduler, info = load_unet(args.pretrained_model_name_or_path, args.start_from)
    classes, base_hash = info["classes"], model_hash(raw)
    made = sets.read(args.prepared_dir, base_hash, args, classes)
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
    average = start_of_average(args.pretrained_model_name_or_path, raw) if args.use_ema else None
    teacher = copy.deepcopy(raw).eval() if needs_teacher(args) else None
    accelerator = training.new_accelerator(args)
    opt = build(args, raw, made)
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


if __name__ == "__main__":
    training.exit_on_input_errors(main)
