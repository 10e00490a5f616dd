"""What a run will do, from the configurations alone, without loading any weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from ..baselines import recipes
from ..text_to_image import memory, outcome, pipelines, prompts, sets
from ..text_to_image.unlearn import SCRIPT
from ..training import adversary, relearner
from ..training.run import check_folder
from . import depth, evidence


class Checked(NamedTuple):
    """What the configurations and the prompts determine."""

    looked: pipelines.Looked
    texts: prompts.Prompts
    cost: memory.Cost


def check(args: Any) -> Checked:
    """Check everything that can be checked before weights are read or time is spent.

    Raises:
        InputError: anything that would end the run immediately.
    """
    depth.check(args)
    check_folder(args, SCRIPT)
    if args.sign_key is not None:
        evidence.signer(args.sign_key, args.sign_certificate)
    looked = pipelines.look(args, weights=False)
    looked.family.refuse(args)
    args = looked.family.guided(args, looked.unet)
    texts = prompts.collect(args, looked.tokenizer, warn=lambda line: None)
    args = replace(args, mixed_precision=args.mixed_precision or "no")
    return Checked(looked, texts, memory.count(args, looked, texts))


def plan(args: Any) -> str:
    """The plan of a run as text, one line per item.

    Raises:
        InputError: see `check`.
    """
    looked, texts, cost = check(args)
    args = looked.family.guided(args, looked.unet)
    per_step = (adversary.passes(args) + relearner.passes(args)) * args.train_batch_size
    closed_form = recipes[args.method].edits
    passes = (
        "none, the edit is computed on the CPU from the prompts' embeddings"
        if closed_form
        else f"{sets.passes(args, looked, texts):,} for the sets, about "
        f"{args.max_train_steps * per_step:,} forward and backward in {args.max_train_steps:,} "
        "steps; the progress bar estimates the time once the first step is done"
    )
    lines = [
        f"model: {args.pretrained_model_name_or_path}, {looked.resolution} pixels",
        f"method: {recipes[args.method].title}, preset {args.preset}; instead: "
        f"{outcome.instead(args)}",
        f"forgets: {', '.join(repr(texts.texts[i]) for i in texts.forget[:5])}"
        f"{f' and {len(texts.forget) - 5} more' if len(texts.forget) > 5 else ''}; keeps "
        f"{len(texts.remember)} prompts",
        f"trained: {outcome.trained(args)}, {cost.trained:,} of "
        f"{cost.trained + cost.frozen:,} parameters",
        f"passes through the model: {passes}",
        f"memory by phase, without about 1 GiB for the CUDA libraries:\n{cost.table()}",
        f"written to {args.output_dir}: {args.save_as}, report/, evidence.json, run.yaml"
        f"{'' if closed_form else ', checkpoints'}",
    ]
    return "\n".join([*lines, *outcome.cautions(args, looked, texts)])
