"""Make a class-conditional diffusion model forget classes, by EBU or by a method to compare.

The paper's setting: 200 steps, Adam 1e-4 (its appendix also says 1e-5), clipping at 1.0, uniform
noise as the surrogate of the class, replayed pairs, losses summed over C, H, W.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import training
from ..baselines import SalUn, methods, reset_weights
from ..diffusion import model_hash
from ..diffusion.objectives import Objectives, needs_own_images, needs_teacher
from ..diffusion.sampling import scheduler_protocol
from ..errors import InputError
from ..manifest import key, of_model
from ..modules import parameter_bytes
from ..training import data
from ..training.ema import Ema, averaged
from ..training.options import ddim_takes
from . import sets
from .models import load_classifier, load_unet, start_of_average
from .options import Unlearn
from .outcome import build, draw, finish, measure, noise_p_f, pictures, say


def unlearn(config: Unlearn) -> None:
    """Run unlearning, or continue an interrupted run; the result is in ``config.output_dir``.

    Raises:
        InputError: options, sets or models do not fit. Nothing is changed.
    """
    with unlearning(config) as run:
        run.finish()


@contextmanager
def unlearning(config: Unlearn) -> Iterator[training.Unlearning]:
    """Like `unlearn`, but the caller takes the steps: yields a run that is ready for them.

    On leaving the context, the result is written.
    """
    args = config.resolved()
    raw, scheduler, info = load_unet(args.pretrained_model_name_or_path, args.start_from)
    looked_at = args.classifier or args.validation_pictures
    steps = ["validation_inference_steps"] if looked_at else []
    steps += ["guided_steps"] if methods[args.method].guided else []
    ddim_takes(args, scheduler, *steps)
    classes, base_hash = info["classes"], model_hash(raw)
    made = sets.read(args.prepared_dir, base_hash, args, classes)
    if (why := needs_own_images(args)) and made.own is None:
        raise InputError(
            f"{why} needs real images of every class to forget; run prepare.py with a data set"
        )
    if args.surrogate == "null_class" and made.surrogate is None:
        raise InputError("--surrogate null_class: run prepare.py with --surrogate_images")
    kept = None
    if args.remember_data == "real":
        real = data.load_for(args, info).only(made.replayed)
        kept = real.images, real.labels
    judge: Any
    plain: Any
    judge, plain = (
        load_classifier(path, classes)[0] if path else None
        for path in (args.classifier, args.entropy_classifier or args.classifier)
    )
    average = start_of_average(args.pretrained_model_name_or_path, raw) if args.use_ema else None
    teacher = copy.deepcopy(raw).eval() if needs_teacher(args) else None
    accelerator = training.new_accelerator(args)
    opt = build(args, raw, made)
    size, same = parameter_bytes(raw), made.made_of()
    same |= {"model": of_model(raw), "scheduler": key(scheduler_protocol(scheduler))}
    same |= {n: of_model(m) for n, m in (("classifier", judge), ("entropy", plain)) if m}
    same |= real.made_of() if args.remember_data == "real" else {}
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
        objects |= losses.state()
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

        ready = training.Unlearning(
            args,
            run,
            accelerator,
            model,
            opt,
            optimizer,
            schedule,
            losses,
            done,
            begin,
            what=", ".join(classes[c] for c in made.forget),
            look=look,
            looks=lambda step: step % args.validation_steps == 0 or step == args.max_train_steps,
            ema=(ema, raw) if ema else None,
        )
        yield ready
        ready.check_whole()
        if accelerator.is_main_process:
            done["noise_p_f"] = judge and noise_p_f(judge, made.forget, info["shape"])
            finish(args, raw, scheduler, info, made, done, ema, base_hash, opt)
        accelerator.wait_for_everyone()
