"""Open what unlearn.py left, or any pipeline: a folder of changes is put into its base."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ..errors import InputError
from ..files import locked
from . import pipelines
from .save import CHANGED

LORA = "pytorch_lora_weights.safetensors"


def look(args: argparse.Namespace, name: str) -> pipelines.Looked:
    """Configurations of the pipeline `name`, or of --base_model where that is changed."""
    return pipelines.look(_whole(args, name))


def load(args: argparse.Namespace, name: str) -> StableDiffusionPipeline:
    """The pipeline `name`, a hub id or a folder; or what unlearn.py changed, its `changed` or
    `lora` folder, put into --base_model.

    Raises:
        InputError: the changes do not fit the base.
    """
    folder, own = Path(name), _whole(args, name)
    pipe = StableDiffusionPipeline.from_pretrained(
        pipelines.fetch(own), variant=own.variant, use_safetensors=True, safety_checker=None
    )
    pipe.unet.float()
    part = _part(folder)
    if part == CHANGED:
        state, ours = load_file(folder / CHANGED), pipe.unet.state_dict()
        other = [n for n, t in state.items() if n not in ours or ours[n].shape != t.shape]
        if other:
            raise InputError(
                f"{folder} does not fit --base_model {args.base_model}, which has no such "
                f"{other[0]}"
            )
        pipe.unet.load_state_dict(state, strict=False)
    elif part == LORA:
        try:
            pipe.load_lora_weights(folder, weight_name=LORA)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{folder} does not fit --base_model {args.base_model}: {error}"
            ) from error
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe


def _part(folder: Path) -> str | None:
    return next((f for f in (CHANGED, LORA) if (folder / f).is_file()), None)


def named_base(name: str) -> str:
    try:
        return json.loads((Path(name) / "unlearn.json").read_text())["base"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--base_model is not given, and {name} has no unlearn.json that names it: give the "
            "model before unlearning, a hub id or a folder"
        ) from error


def _whole(args: argparse.Namespace, name: str) -> argparse.Namespace:
    whole = (args.base_model or named_base(name)) if _part(Path(name)) else name
    own = argparse.Namespace(**{**vars(args), "pretrained_model_name_or_path": whole})
    if Path(whole).is_dir():  # the base may be a variant of the hub's, and the result a folder
        own.variant = own.revision = None
    return own


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """--output_dir, made, for this process alone.

    Raises:
        InputError: another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / ".lock", folder))
        except RuntimeError as error:
            raise InputError(f"--output_dir is in use: {error}") from error
        yield
