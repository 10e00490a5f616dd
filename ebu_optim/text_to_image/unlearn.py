"""Make a text-to-image model forget concepts, by EBU or by a method that it is compared with.

The defaults are the paper's: cross attention, 1000 steps, batch size 1, learning rate 1e-5, and
images of the empty prompt as the surrogate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed

from .. import training
from ..baselines import recipes
from ..diffusion import anchored, model_hash, objectives
from ..errors import InputError
from ..manifest import refuse_changed
from ..training import method as method_options
from . import (
    edits,
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
)
from .families import Conditions
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
def unlearning(config: Unlearn) -> Iterator[training.Unlearning | training.NoSteps]:
    """Like `unlearn`, but the caller takes the steps.

    The context yields an `Unlearning` that is ready for its steps, and writes the result at its
    end. An edit in closed form has none to take."""
    args: Any = config.resolved()  # all defaults are filled in
    looked = pipelines.look(args)
    looked.family.refuse(args)
    args = looked.family.guided(args, looked.unet)
    guided = ["guided_steps"] if recipes[args.method].guided else []
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
    size, closed_form = 4 * cost.trained, bool(recipes[args.method].edits)
    with training.Run(
        args,
        accelerator,
        SCRIPT,
        size=0 if closed_form else size,  # without checkpoints
        parts=(*save.FOLDERS, "validation"),
        result=whole if args.save_as == "pipeline" else size,
    ) as run:
        args = replace(args, hub_model_id=hub.create(args, accelerator))
        way = edited if closed_form else trained
        with way(args, run, looked, texts) as (ready, ended):
            yield ready
        if accelerator.is_main_process:
            opt, done, base = ended.opt, ended.done, ended.folder
            report = outcome.describe(args, texts, cost, ended.base, opt, done, looked.family)
            there = save.kept(args, base, report) if ended.before else None
            if there:
                print(f"{there} was already saved, with its README.md")
            else:
                print(f"saved {save.save(args, ended.raw, base, report)}")
        accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        forgot = f"Forgets {', '.join(args.forget)} ({recipes[args.method].title})"
        print(f"uploaded {hub.upload(args, args.output_dir / args.save_as, forgot)}")


class Ended(NamedTuple):
    """What the result is written from.

    Attributes:
        folder, base: of the pretrained pipeline, and the hash of its denoiser.
        raw: the model with its new weights.
        opt: the optimizer; None for an edit in closed form.
        done: the seconds, and what was learned from.
        before: whether an earlier run had taken all steps.
    """

    folder: Path
    base: str
    raw: modules.Prompted
    opt: Any
    done: dict[str, Any]
    before: bool


@contextmanager
def edited(
    args: Any, run: training.Run, looked: pipelines.Looked, texts: prompts.Prompts
) -> Iterator[tuple[training.NoSteps, Ended]]:
    """The model edited in closed form, without steps to take."""
    folder, table, unet, base = opened(args, run.accelerator, looked, texts)
    modules.choose(unet, args, looked.family)
    start = time.perf_counter()
    edits.edit(args.method, unet, table, texts, looked.tokenizer, args.method_options)
    done = {
        "seconds": time.perf_counter() - start,
        "made_of": sets.made_of(args, folder, texts),
    }
    raw = modules.Prompted(unet, table, looked.family)
    yield training.NoSteps(run.accelerator), Ended(folder, base, raw, None, done, False)


@contextmanager
def trained(
    args: Any, run: training.Run, looked: pipelines.Looked, texts: prompts.Prompts
) -> Iterator[tuple[training.Unlearning, Ended]]:
    """The model, ready for its steps, which the caller takes inside of the context."""
    accelerator = run.accelerator
    folder, base, made, raw, fisher = learn_from(args, accelerator, looked, texts)
    weights = raw.trained()
    teacher, anchor = None, None
    if objectives.needs_teacher(args):
        anchor = {p: p.detach() for p in weights.values()}
    opt = method_options.build(args, weights.items(), fisher, anchor)
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
    refuse_changed(done["made_of"], made_of, f"--resume_from_checkpoint: the run in {run.folder}")
    if recipes[args.method].masked and not begin:
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
    before = begin == args.max_train_steps
    yield ready, Ended(folder, base, raw, opt, done, before)
    ready.check_whole()


def opened(
    args: Any, accelerator: Any, looked: pipelines.Looked, texts: prompts.Prompts
) -> tuple[Path, Conditions, Any, str]:
    """The base's folder, the conditions of all prompts, the denoiser on the CPU, and its hash."""
    with accelerator.main_process_first():
        folder = pipelines.fetch(args)
    with accelerator.main_process_first():  # before the denoiser takes memory
        table = sets.conditions(args, looked, folder, texts.texts, accelerator.device)
    part = looked.family.denoiser
    unet = pipelines.load(looked.family.kind(part), folder / part, args.variant)
    return folder, table, unet, model_hash(unet)


def learn_from(
    args: Unlearn, accelerator: Any, looked: pipelines.Looked, texts: prompts.Prompts
) -> tuple[Path, str, sets.Made, modules.Prompted, Any]:
    """The base's folder and hash, the sets, the model with its trained weights chosen, and F.

    The main process makes what does not exist yet, the other processes read it."""
    device, dtype = accelerator.device, save.DTYPES[accelerator.mixed_precision]
    folder, table, unet, base = opened(args, accelerator, looked, texts)
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
        edits.edit(args.warm_start, unet, table, texts, looked.tokenizer)
    if dtype != torch.float32:  # before the model is moved to the device
        modules.halve_frozen(unet, dtype)
    if args.quantize:
        quantized.quantize(unet, args.quantize, looked.family.units, device)
        quantized.keep_apart(raw)
    raw.to(device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return folder, base, made, raw, None if fisher == "none" else fisher
