"""Make a model forget: takes a model and a concept, writes the model without it and the evidence.

ebu forget model.safetensors "cassette player" --as radio --keep neighbours.txt -o without

By default 1000 steps of EBU train the whole denoiser in float32, on images that the model itself
generates: 200 for the prompts to keep and 100 for the concept. The result has the form in which
the model came. --plan prints what a request costs. These options need the least memory:
--train_modules lora --mixed_precision fp16 --gradient_checkpointing. The first group of options
describes the request; all others can keep their defaults.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import nn

from ..errors import InputError
from ..files import replacing
from ..modules import refuse_hooks
from ..text_to_image import room
from ..text_to_image import unlearn as train
from ..training.fields import as_yaml
from . import evidence, pictures, planning
from .options import Forget


class Forgotten(NamedTuple):
    """What `forget` returns.

    Attributes:
        pipeline: the pipeline without the concept, in float32 on the CPU; None on all processes
            but the first.
        figures: the report's figures, name -> value, see `pictures.measure`.
        folder: the folder with the result and its evidence.
    """

    pipeline: Any
    figures: dict[str, Any]
    folder: Path


def forget(
    model: Any,
    concept: str | Sequence[str] = (),
    *,
    output_dir: str | os.PathLike[str],
    instead: str | Sequence[str] = (),
    keep: Sequence[str] | str | None = None,
    **options: Any,
) -> Forgotten | None:
    """Make a text-to-image model forget a concept, or several.

    Args:
        model: a file, a diffusers folder, a hub id, or a diffusers pipeline.
        concept: the concept in a word or a few; or a file with one concept per line.
        output_dir: the folder for the result and its evidence.
        instead: what each concept becomes, within the same template; default: what the model
            generates for the empty prompt.
        keep: prompts whose images must stay, above all prompts near the concept, or a file of
            them; default: the prompts that ship with the package.
        options: fields of :class:`Forget`, as on the command line.

    Returns:
        The pipeline, the figures and the folder; None with ``plan=True``, which prints the plan.

    Raises:
        InputError: an option is wrong, found before time is spent.
    """
    if not isinstance(model, (str, os.PathLike)):
        model = _saved(model, Path(output_dir))
    given: dict[str, Any] = {"surrogate_concept": _listed(instead), **options}
    if keep is not None:
        given["remember_prompts"] = _listed(keep)
    config = Forget(
        pretrained_model_name_or_path=str(model),
        forget=_listed(concept),
        output_dir=Path(output_dir),
        **given,
    )
    return run(config)


def run(config: Forget) -> Forgotten | None:
    """Run a request as the command `ebu forget` does; see `forget`."""
    args: Any = config.resolved()
    if args.plan:
        print(planning.plan(args))
        return None
    looked, texts, cost = planning.check(args)
    if torch.cuda.is_available() and not args.cpu:
        card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        room.check(args, looked, texts, cost, card)
    train.unlearn(args)
    state = PartialState()
    if not state.is_main_process:
        return Forgotten(None, {}, args.output_dir)
    with replacing(args.output_dir / evidence.CONFIG) as work:
        work.write_text(as_yaml(again(config)), encoding="utf-8")
    figures = pictures.report(args)
    evidence.write(args)
    print(f"evidence: {args.output_dir / evidence.FILE}; check it with `ebu verify`")
    return Forgotten(pictures.after(args), figures, args.output_dir)


def again(config: Forget) -> Forget:
    """The config that makes the same result again, without resuming or overwriting a run."""
    return replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _saved(pipe: Any, output_dir: Path) -> Path:
    """The folder next to the result into which the caller's pipeline is saved."""
    if not hasattr(pipe, "save_pretrained"):
        raise InputError(
            f"model must be a file, a folder, a hub id or a pipeline; got {type(pipe).__name__}"
        )
    for name, part in getattr(pipe, "components", {}).items():
        if isinstance(part, nn.Module):
            try:
                refuse_hooks(part, f"model's {name}")
            except ValueError as error:
                raise InputError(str(error)) from error
    folder = output_dir.with_name(f"{output_dir.name}_base")
    if not (folder / "model_index.json").is_file():
        pipe.save_pretrained(folder)
    return folder
