"""Make a model forget: a model and a concept in, the model without it and its evidence out.

ebu forget model.safetensors "cassette player" --as radio --keep neighbours.txt -o without

By default 1000 steps of EBU train the whole denoiser in float32, on images that the model draws
itself: 200 of what is kept and 100 of the concept. The result has the form in which the model came.
--plan prints what a request costs. The least memory is taken by
--train_modules lora --mixed_precision fp16 --gradient_checkpointing. The first group of options is
the request; all others may stay as they are.
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
    """Attributes:
    pipeline: without the concept, float32, on the CPU; None on processes that are not the first.
    figures: of the report: name -> value, see `pictures.measure`.
    folder: with the result and its evidence.
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
        model: a file, a diffusers folder, a hub id, or a pipeline of diffusers.
        concept: in a word or a few; or a file with one a line.
        output_dir: gets the result and its evidence.
        instead: what each concept becomes, in the words around it; default: what the empty prompt
            draws.
        keep: prompts, or a file of them, above all of what lies near; default: those that ship.
        options: of :class:`Forget`, as on the command line.

    Returns:
        The pipeline, the figures and the folder; None with ``plan=True``, which prints.

    Raises:
        InputError: whatever can be told before time is spent.
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
    """As the command does it."""
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
    print(f"evidence: {args.output_dir / evidence.FILE}, to be checked by `ebu verify`")
    return Forgotten(pictures.after(args), figures, args.output_dir)


def again(config: Forget) -> Forget:
    """What makes the same result in another folder, and never in place of a finished one."""
    return replace(config, resume_from_checkpoint=None, overwrite_output_dir=False)


def _listed(words: str | Sequence[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _saved(pipe: Any, output_dir: Path) -> Path:
    """A pipeline of the caller's as a folder beside the result."""
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
