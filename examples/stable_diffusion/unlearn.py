"""Make Stable Diffusion 1.x or 2.x forget concepts, by EBU or by what it is compared with.

    accelerate launch examples/stable_diffusion/unlearn.py \\
        --pretrained_model_name_or_path CompVis/stable-diffusion-v1-4 \\
        --forget "cassette player" --forget_templates "an image of a {}" \\
        --mixed_precision fp16 --output_dir outputs/without_cassette_player

The paper's setting is the default: cross attention, 1000 steps, batch size 1, learning rate 1e-5,
images of the empty prompt as what the concept becomes. docs/stable_diffusion.md is the guide.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "ddpm"))  # training loop, options and losses are shared

import cache  # noqa: E402
import hub  # noqa: E402
import memory  # noqa: E402
import method_options  # noqa: E402
import modules  # noqa: E402
import pipelines  # noqa: E402
import prompts  # noqa: E402
import save  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import unlearn_losses  # noqa: E402
import validation  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from losses import Losses  # noqa: E402
from sources import InputError  # noqa: E402
from unlearn_report import settings  # noqa: E402

from ebu_optim.baselines import SalUn, methods  # noqa: E402
from ebu_optim.diffusion import anchored, model_hash  # noqa: E402
from ebu_optim.metrics import versions  # noqa: E402

#: --method: short names, and those of the table that text-to-image models have.
ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = (*ALIASES, *(m for m in methods if m not in ("retrain", "embedding_only")))

#: Numbers of the published text-to-image runs; SA's lambda of 50 belongs to an F of the loss summed
#: over 1000 timesteps, ours is of their mean.
PUBLISHED = {"selective_amnesia": {"lam": 5e7}, "salun": {"remember_weight": 0.5}}
LEARNING_RATE = {"spm": 1e-4}
UNCLIPPED = ("esd", "spm")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    pipelines.add_arguments(parser)
    prompts.add_arguments(parser)
    method_options.add_arguments(parser, METHODS, "estimate")
    modules.add_arguments(parser)
    unlearn_losses.add_arguments(parser, "--remember_loss", reduction="mean")
    for part in (cache, validation, save, hub):
        part.add_arguments(parser)
    training.add_arguments(parser, train_batch_size=1, learning_rate=None, max_grad_norm=None)
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE.get(args.method, 1e-5)
    if args.max_grad_norm is None:
        args.max_grad_norm = 0.0 if args.method in UNCLIPPED else 1.0
    training.check(args)
    method_options.check(args, ALIASES)
    args.method_options = {**PUBLISHED.get(args.method, {}), **args.method_options}
    if args.method == "spm" and args.train_modules is not None:
        raise InputError(
            f"--train_modules {args.train_modules}: SPM trains adapters of its own; leave it out"
        )
    if args.method != "spm" and args.train_modules is None:
        args.train_modules = "xattn"
    if args.rank < 1:
        raise InputError(f"--rank must be >= 1; got {args.rank}")
    if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
        raise InputError(f"--lora_alpha must be finite, > 0; got {args.lora_alpha}")
    for part in (unlearn_losses, cache, validation, save, hub):
        part.check(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(argv)
    looked = pipelines.look(args)
    for name in ("num_inference_steps", "guided_steps", "validation_inference_steps"):
        if getattr(args, name) > (most := looked.scheduler.config.num_train_timesteps):
            raise InputError(f"--{name} must be <= {most}, the model's; got {getattr(args, name)}")
    texts = prompts.collect(args, looked.tokenizer)
    accelerator = training.new_accelerator(args)
    args.mixed_precision = accelerator.mixed_precision
    if args.mixed_precision not in save.DTYPES:
        raise InputError(f"mixed precision {args.mixed_precision}: give no, fp16 or bf16")
    cost = memory.count(args, looked, texts)
    say(accelerator, args, texts, cost)
    whole = 6 * (cost.trained + cost.frozen)  # the UNet with VAE and text encoder
    size = 4 * cost.trained
    with training.Run(
        args, accelerator, "unlearn_text_to_image", size=size, parts=(*save.FOLDERS, "validation"),
        result=whole if args.save_as == "pipeline" else size,
    ) as run:  # fmt: skip
        hub.create(args, accelerator)
        folder, base, made, raw, fisher = learn_from(args, accelerator, looked, texts)
        trained = list(raw.trained().values())
        teacher, anchor = None, None
        if unlearn_losses.needs_teacher(args):
            anchor = {p: p.detach() for p in trained}
        opt = method_options.build(args, trained, fisher, anchor)
        if anchor:
            teacher = anchored(raw, opt if opt.anchors() else modules.Theta0(raw))
        schedule = training.new_schedule(args, opt)
        model, optimizer = accelerator.prepare(raw.train(), opt)
        losses = Losses(
            args, texts, made, model, raw, teacher, looked.scheduler, accelerator, looked.latents
        )
        # whatever making the sets drew, and whether they were there already
        set_seed(args.seed, device_specific=True)
        done: dict[str, Any] = {"seconds": 0.0, "base": base}
        begin = run.resume(
            {"trained": modules.Trained(raw), "optimizer": opt, "schedule": schedule, "done": done}
        )
        if done["base"] != base:
            raise InputError(
                f"--resume_from_checkpoint: the run is of a model of hash {done['base']}, "
                f"{args.pretrained_model_name_or_path} now has {base}"
            )
        if isinstance(opt, SalUn) and not begin:
            opt.make_mask(losses.for_mask())

        def look(step: int) -> None:
            if args.validation_steps and accelerator.is_main_process:
                images = validation.draw(
                    args, raw, looked.scheduler, texts.shown, texts.null, looked.latents, folder
                )
                validation.write(args, accelerator, images, step)
            accelerator.wait_for_everyone()

        if not begin:
            look(0)
        for step in run.steps(begin, f"forgetting {', '.join(args.forget)}"):
            start = time.perf_counter()
            said = training.unlearning_step(accelerator, model, opt, optimizer, losses, step)
            schedule.step()
            done["seconds"] += time.perf_counter() - start
            if step % args.logging_steps == 0:
                run.log(step, **training.figures(said, opt))
            last = step == args.max_train_steps
            if last or (args.validation_steps and step % args.validation_steps == 0):
                look(step)
        if accelerator.is_main_process:
            report = describe(args, texts, cost, base, opt, done)
            there = save.kept(args, folder, report) if begin == args.max_train_steps else None
            if there:
                print(f"saved {there} before, with its README.md")
            else:
                print(f"saved {save.save(args, raw, folder, report)}")
        accelerator.wait_for_everyone()
    if args.push_to_hub and accelerator.is_main_process:
        forgot = f"Forgets {', '.join(args.forget)} ({methods[args.method].title})"
        print(f"uploaded {hub.upload(args, args.output_dir / args.save_as, forgot)}")


def learn_from(
    args: argparse.Namespace, accelerator: Any, looked: pipelines.Looked, texts: prompts.Prompts
) -> tuple[Path, str, cache.Made, modules.Prompted, Any]:
    """The base's folder and hash, the sets, the model with what is trained chosen, and its F. The
    main process makes what is not there yet, the others read it."""
    device, dtype = accelerator.device, save.DTYPES[args.mixed_precision]
    with accelerator.main_process_first():
        folder = pipelines.fetch(args)
    unet = pipelines.load(UNet2DConditionModel, folder / "unet", args.variant)
    base = model_hash(unet)
    with accelerator.main_process_first():
        table = cache.embeddings(args, folder, looked.tokenizer, texts.texts, device)
        with accelerator.autocast():
            made = cache.make(args, looked, folder, texts, unet, table, base, device)
        modules.choose(unet, args)
        raw = modules.Prompted(unet, table).to(device)
        fisher = method_options.fisher_source(args, "estimate")
        if fisher == "estimate":
            fisher = cache.fisher(args, made, looked.scheduler, unet, table)
    if dtype != torch.float32:
        modules.halve_frozen(unet, dtype)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return folder, base, made, raw, None if fisher == "none" else fisher


def instead(args: argparse.Namespace) -> str:
    """What is drawn in place of the forgotten, in words."""
    kind = unlearn_losses.kind(args)
    prompt = " or ".join(f"`{t}`" if t else "the empty prompt" for t in args.surrogate_prompt)
    if args.surrogate_concept:
        prompt = f"{' or '.join(f'`{c}`' for c in args.surrogate_concept)} in the same words"
    if kind == "surrogate":
        other = {"folder": f"images like those in `{args.surrogate_dir}`", "pixels": "noise"}
        return other.get(args.surrogate, f"what {prompt} draws" if args.surrogate == "prompt"
                         else "noise")  # fmt: skip
    if kind == "relabel":
        return f"what {prompt} draws"
    if kind in ("guidance", "adapter"):
        return "what guidance away from it gives"
    return "something else"


def unused(args: argparse.Namespace) -> list[str]:
    """Options that were given and do nothing with this method."""
    kind, by = unlearn_losses.kind(args), methods[args.method].forgets
    images = kind == "surrogate"
    remembers = "remember" in method_options.needs(args) and by != "adapter"
    no_fisher = method_options.fisher_source(args, "estimate") is None
    prompted = kind == "relabel" or (images and args.surrogate == "prompt")
    found = {
        "--surrogate": args.surrogate != "prompt" and not images,
        "--surrogate_prompt": args.surrogate_prompt != [""] and not prompted,
        "--surrogate_concept": bool(args.surrogate_concept) and not prompted,
        "--forget_dir": args.forget_dir is not None and not unlearn_losses.needs_own_images(args),
        "--remember": args.remember_prompts != [str(prompts.REMEMBER)] and not remembers,
        "--remember_loss": args.remember != "replay" and not remembers,
        "--fisher": args.fisher is not None and no_fisher,
        "--esd_variant": args.esd_variant != "paper" and by != "guidance",
        "--esd_eta": args.esd_eta is not None and by not in ("guidance", "adapter"),
        "--lora_alpha": args.lora_alpha is not None and args.train_modules != "lora",
        "--lora_target_modules": args.lora_target_modules != modules.LORA_TARGETS
        and args.train_modules != "lora",
    }
    return [option for option, idle in found.items() if idle]


def say(accelerator: Any, args: argparse.Namespace, texts: prompts.Prompts, cost: Any) -> None:
    """What will be done, and what it costs."""
    names = [texts.texts[i] for i in texts.forget]
    module = "adapters" if args.method == "spm" else args.train_modules
    remembered = f"{len(texts.remember)} prompts"
    if methods[args.method].forgets == "adapter":
        remembered = "random embeddings"
    elif "remember" not in method_options.needs(args):
        remembered = "nothing"
    accelerator.print(
        f"{methods[args.method].title}: forgets {', '.join(map(repr, names[:5]))}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; instead {instead(args)}; "
        f"remembers {remembered}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device}\n"
        f"trained: {module}, {cost.trained:,} of {cost.trained + cost.frozen:,} parameters\n"
        f"memory of each process, without about 1 GiB of the libraries:\n{cost.table()}"
    )
    if idle := unused(args):
        accelerator.print(f"without effect on this run: {', '.join(idle)}")
    if remembered[0].isdigit() and args.replay_images < len(texts.remember):
        accelerator.print(
            f"warning: --replay_images {args.replay_images} are of the first as many of "
            f"{len(texts.remember)} prompts; the others are not replayed"
        )
    passes = cache.passes(args, texts)
    if passes:
        accelerator.print(
            f"sets in {args.sets_dir}: {passes} passes through the UNet, unless they are there"
        )


def describe(
    args: argparse.Namespace, texts: prompts.Prompts, cost: Any, base: str, opt: Any, done: dict
) -> dict[str, Any]:
    """unlearn.json."""
    named = {
        n: [texts.texts[i] for i in getattr(texts, n)] for n in ("forget", "surrogate", "remember")
    }
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "method": args.method, "title": methods[args.method].title, **named,
        "instead": instead(args), "base": args.pretrained_model_name_or_path,
        "revision": args.revision, "base_hash": base, "seconds": done["seconds"],
        "train_modules": "SPM's adapters" if args.method == "spm" else args.train_modules,
        "trained": cost.trained, "memory_counted": cost.report(), "memory_measured": peak,
        "settings": settings(args, opt), "versions": versions(),
        "options": {k: str(v) for k, v in vars(args).items()},
    }  # fmt: skip


if __name__ == "__main__":
    training.exit_on_input_errors(main)
