"""What unlearn.py prints and reports about a run: its plan and cost, and afterwards its result."""

from __future__ import annotations

from typing import Any

import torch

from ..baselines import recipes
from ..class_conditional.outcome import settings
from ..diffusion import objectives
from ..metrics import versions
from ..training import method as method_options
from ..training.fields import as_dict, named
from . import prompts, sets
from .families import Family
from .pipelines import Looked


def instead(args: Any) -> str:
    """What the model should generate instead of the concept, in words."""
    kind = objectives.kind(args)
    prompt = " or ".join(f"`{t}`" if t else "the empty prompt" for t in args.surrogate_prompt)
    if args.surrogate_concept:
        others = list(dict.fromkeys(args.surrogate_concept))
        more = f" or {len(others) - 5} more" if len(others) > 5 else ""
        each = ", each concept its own," if args.surrogate_pairing == "each" else ""
        prompt = f"{' or '.join(f'`{c}`' for c in others[:5])}{more}{each} in the same words"
    if kind == "surrogate":
        other = {
            "prompt": f"what the base model generates for {prompt}",
            "folder": f"images like those in `{args.surrogate_dir}`",
        }
        return other.get(args.surrogate, "noise")
    if kind in ("relabel", "edit"):
        return f"what the base model generates for {prompt}"
    if kind in ("guidance", "adapter"):
        return "what guidance away from it gives"
    return "something else"


def trained(args: Any) -> str:
    """The trained or edited part of the denoiser, in words."""
    recipe = recipes[args.method]
    if recipe.edits:
        return f"{' and '.join(recipe.edits)}, edited in closed form"
    return "SPM's adapters" if recipe.adapter else args.train_modules


def unused(args: Any) -> list[str]:
    """The given options that have no effect with this method."""
    kind, by = objectives.kind(args), recipes[args.method].forgets
    images = kind == "surrogate"
    closed_form = by == "edit"
    remembers = "remember" in method_options.needs(args) and by != "adapter"
    no_fisher = method_options.fisher_source(args, "estimate") is None
    prompted = kind in ("relabel", "edit") or (images and args.surrogate == "prompt")
    found = {
        "--surrogate": args.surrogate != "prompt" and not images,
        "--surrogate_prompt": args.surrogate_prompt != [""] and not prompted,
        named(args, "surrogate_concept"): bool(args.surrogate_concept) and not prompted,
        "--forget_dir": args.forget_dir is not None and not objectives.needs_own_images(args),
        named(args, "remember_prompts"): args.remember_prompts != [str(prompts.REMEMBER)]
        and not (remembers or closed_form),
        "--remember_loss": args.remember != "replay" and not remembers,
        "--fisher": args.fisher is not None and no_fisher,
        "--esd_variant": args.esd_variant != "paper" and by != "guidance",
        "--esd_eta": args.esd_eta is not None and by not in ("guidance", "adapter"),
        "--lora_alpha": args.lora_alpha is not None and args.train_modules != "lora",
        "--lora_target_modules": args.lora_target_modules is not None
        and args.train_modules != "lora",
        "--learning_rate": args.learning_rate is not None and closed_form,
        "--max_grad_norm": args.max_grad_norm is not None and closed_form,
        "--train_batch_size": args.train_batch_size != 1 and closed_form,
    }
    return [option for option, idle in found.items() if idle]


def cautions(args: Any, looked: Looked, texts: prompts.Prompts) -> list[str]:
    """Warnings about options that do nothing, or less than they seem to do; one line each."""
    recipe, lines = objectives.recipe_of(args), []
    if idle := unused(args):
        lines.append(f"without effect on this run: {', '.join(idle)}")
    remembers = recipe.replayed and "remember" in method_options.needs(args)
    if remembers and args.replay_images < len(texts.remember):
        lines.append(
            f"warning: --replay_images {args.replay_images}: only as many of the "
            f"{len(texts.remember)} prompts are replayed, the first ones"
        )
    if recipe.teacher and (recipe.forgets is None or recipe.stalls):
        lines.append(
            f"warning: {recipe.title} with --remember_loss {args.remember} learns nothing: the "
            "teacher equals the model at the start, and the method has no gradient that leads "
            "away from it; give replay"
        )
    if why := looked.family.distilled(args.pretrained_model_name_or_path, looked.unet):
        lines.append(f"warning: {why}")
    return lines


def say(accelerator: Any, args: Any, looked: Looked, texts: prompts.Prompts, cost: Any) -> None:
    """Print what the run will do and what it costs."""
    names = [texts.texts[i] for i in texts.forget]
    remembered = f"{len(texts.remember)} prompts"
    if recipes[args.method].forgets == "adapter":
        remembered = "random embeddings"
    elif not recipes[args.method].edits and "remember" not in method_options.needs(args):
        remembered = "nothing"
    accelerator.print(
        f"{recipes[args.method].title}: forgets {', '.join(map(repr, names[:5]))}"
        f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; instead {instead(args)}; "
        f"remembers {remembered}; {accelerator.num_processes} process(es) on "
        f"{accelerator.device}\n"
        f"trained: {trained(args)}, {cost.trained:,} of {cost.trained + cost.frozen:,} parameters\n"
        f"memory of each process, without about 1 GiB for the CUDA libraries:\n{cost.table()}"
    )
    for line in cautions(args, looked, texts):
        accelerator.print(line)
    passes = sets.passes(args, looked, texts)
    if passes:
        accelerator.print(
            f"sets in {args.sets_dir}: {passes} passes through the denoiser, unless they exist"
        )


def describe(
    args: Any, texts: prompts.Prompts, cost: Any, base: str, opt: Any, done: dict, family: Family
) -> dict[str, Any]:
    """The content of unlearn.json.

    Args:
        opt: the optimizer; None for an edit in closed form.
    """
    recipe = recipes[args.method]
    named = {
        n: [texts.texts[i] for i in getattr(texts, n)] for n in ("forget", "surrogate", "remember")
    }
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "method": args.method,
        "title": recipe.title,
        **named,
        "instead": instead(args),
        "base": args.pretrained_model_name_or_path,
        "pipeline": family.pipeline.__name__,
        "revision": args.revision,
        "base_hash": base,
        "made_of": done["made_of"],
        "seconds": done["seconds"],
        "train_modules": trained(args),
        "trained": cost.trained,
        "memory_counted": cost.report(),
        "memory_measured": peak,
        "settings": settings(args, opt) if opt else {**recipe.defaults, **args.method_options},
        "versions": versions(),
        "options": {k: str(v) for k, v in as_dict(args).items()},
    }
