"""Make a text-to-image model forget concepts, by EBU or by a method that it is compared with.

The defaults are the paper's: cross attention, 1000 steps, batch size 1, learning rate 1e-5, and
images of the empty prompt as the surrogate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from .. import training
from ..baselines import methods
from ..diffusion import anchored, model_hash, objectives
from ..errors import InputError
from ..manifest import refuse_changed
from ..training import method as method_options
from . import (
    hub,
    memory,
    modules,
    outcome,
    pipelines,
    prompts,
    quantized,
    room,
    save,
    sets,
    validation,
    warm_start,
)
from .objectives import TextObjectives
from .options import Unlearn

SCRIPT = "unlearn_text_to_image"  # identifies the kind of run in its folder


def unlearn(config: Unlearn) -> None:
    """Run an unlearning or resume one; the result is in ``config.output_dir``.

    Raises:
        InputError: options, prompts, images or the model do not fit. Nothing was changed then.
    """
    with unlearning(config) as run:
        run.finish()


@contextmanager
def unlearning(config: Unlearn) -> Iterator[training.Unlearning]:
    """Like `unlearn`, but the caller takes the steps.

    The context yields an `Unlearning` that is ready for its steps, and writes the result at its
    end."""
    args: Any = config.resolved()  # all defaults are filled in
    looked = pipelines.look(args)
    looked.family.refuse(args)
    args = looked.family.guided(args, looked.unet)
    guided = ["guided_steps"] if methods[args.method].guided else []
    steps = ["num_inference_steps", "validation_inference_steps", *guided]
    looked.family.check_steps(args, looked.scheduler, *steps)
    texts = prompts.collect(args, looked.tokenizer)
    accelerator = training.new_accelerator(args)
    args = replace(args, mixed_precision=accelerator.mixed_precision)
    if args.mixed_precision not in save.DTYPES:
        raise InputError(
            f"--mixed_precision {args.mixed_precision} is not supported: give no, fp16 or bf16"
        )
    looked.family.refuse(args)  # the precision may come from accelerate's own settings
    quantized.check(args.quantize)
    cost = memory.count(args, looked, texts)
    outcome.say(accelerator, args, looked, texts, cost)
    room.check(args, looked, texts, cost, accelerator.device)
    whole = 6 * (cost.trained + cost.frozen)  # the denoiser with VAE and text encoders
    size = 4 * cost.trained
    with training.Run(
        args,
        accelerator,
        SCRIPT,
        size=size,
        parts=(*save.FOLDERS, "validation"),
        result=whole if args.save_as == "pipeline" else size,
    ) as run:
        args = replace(args, hub_model_id=hub.create(args, accelerator))
        folder, base, made, raw, fisher = learn_from(args, accelerator, looked, texts)
        trained = raw.trained()
        teacher, anchor = None, None
        if objectives.needs_teacher(args):
            anchor = {p: p.detach() for p in trained.values()}
        opt = method_options.build(args, trained.items(), fisher, anchor)
        if anchor:
            teacher = anchored(raw, opt if opt.anchors() else modules.Theta0(raw))
        schedule = training.new_schedule(args, opt)
        model, optimizer = accelerator.prepare(raw.train(), opt)
        losses = TextObjectives(
            args, texts, made, model, raw, teacher, looked.scheduler, accelerator, looked.latents
        )
        # independent of whether the sets were sampled now or existed
        set_seed(args.seed, device_specific=True)
        made_of = sets.made_of(args, folder, texts)
        done: dict[str, Any] = {"seconds": 0.0, "made_of": made_of}
        begin = run.resume(
            {
                "trained": modules.Trained(raw),
                "optimizer": opt,
                "schedule": schedule,
                "done": done,
                **losses.state(),
            }
        )
        refuse_changed(
            done["made_of"], made_of, f"--resume_from_checkpoint: the run in {run.folder}"
        )
        if methods[args.method].masked and not begin:
            opt.make_mask(losses.for_mask())

        def look(step: int) -> None:
            if args.validation_steps and accelerator.is_main_process:
                images = validation.draw(
                    args, raw, looked.scheduler, texts.shown, texts.null, looked.latents, folder
                )
                validation.write(args, accelerator, images, step)
            accelerator.wait_for_everyone()

        def looks(step: int) -> bool:
            last = step == args.max_train_steps
            return last or bool(args.validation_steps and step % args.validation_steps == 0)

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
            what=", ".join(args.forget),
            look=look,
            looks=looks,
        )
        yield ready
        ready.check_whole()
        if accelerator.is_main_process:
            report = outcome.describe(args, texts, cost, base, opt, done, looked.family)
            there = save.kept(args, folder, report) if begin == args.max_train_steps else None
            if there:
                print(f"{there} was already saved, with its README.md")
            else:
                print(f"saved {save.save(args, raw, folder, report)}")
        accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        forgot = f"Forgets {', '.join(args.forget)} ({methods[args.method].title})"
        print(f"uploaded {hub.upload(args, args.output_dir / args.save_as, forgot)}")


def learn_from(
    args: Unlearn, accelerator: Any, looked: pipelines.Looked, texts: prompts.Prompts
) -> tuple[Path, str, sets.Made, modules.Prompted, Any]:
    """The base's folder and hash, the sets, the model with its trained weights chosen, and F.

    The main process makes what does not exist yet, the other processes read it."""
    device, dtype = accelerator.device, save.DTYPES[accelerator.mixed_precision]
    with accelerator.main_process_first():
        folder = pipelines.fetch(args)
    with accelerator.main_process_first():  # before the denoiser takes memory
        table = sets.conditions(args, looked, folder, texts.texts, device)
    part = looked.family.denoiser
    unet = pipelines.load(looked.family.kind(part), folder / part, args.variant)
    base = model_hash(unet)
    with accelerator.main_process_first():
        with accelerator.autocast():
            made = sets.make(args, looked, folder, texts, unet, table, base, device)
        modules.choose(unet, args, looked.family)
        raw = modules.Prompted(unet, table, looked.family)
        fisher = method_options.fisher_source(args, "estimate")
        if fisher == "estimate":
            raw.to(device)
            fisher = sets.fisher(args, made, looked, unet, table)
    if args.warm_start:  # after what is made of the base, whose files' names do not know of it
        warm_start.edit(args, unet, table, texts, looked.tokenizer)
    if dtype != torch.float32:  # before the model is moved to the device
        modules.halve_frozen(unet, dtype)
    if args.quantize:
        quantized.quantize(unet, args.quantize, looked.family.units, device)
        quantized.keep_apart(raw)
    raw.to(device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return folder, base, made, raw, None if fisher == "none" else fisher
