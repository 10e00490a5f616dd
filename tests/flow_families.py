"""The tiny pipelines with a transformer, by names, and what their tests share."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebu_optim.training.command_line import parse

from .cross_attention import pixart, qwen_image, sana
from .scripts import reset_accelerate
from .text_to_image import few, flux, klein, sd3, z_image

MADE: dict[str, Callable[[Path], Path]] = {
    "sd3": sd3,
    "sd3_without_t5": lambda folder: sd3(folder, with_t5=False),
    "flux_dev": flux,
    "flux_schnell": lambda folder: flux(folder, dev=False),
    "klein": klein,
    "klein_distilled": lambda folder: klein(folder, distilled=True),
    "z_image": z_image,
    "pixart": pixart,
    "sana": sana,
    "qwen_image": qwen_image,
}


def size(model: Path) -> int:
    """Of a picture of the pipeline in a folder of this name."""
    return 32 if "sana" in model.name else 16


def module(name: str) -> Any:
    where = name if "." in name else f"ebu_optim.text_to_image.{name}"
    return importlib.import_module(where)


def look(folder: Path) -> Any:
    p = module("pipelines")
    return p.look(p.Model(pretrained_model_name_or_path=str(folder), resolution=size(folder)))


def opened(folder: Path) -> Any:
    """As diffusers opens it, which wants to be told of SD3's T5 that is not there."""
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    there = "text_encoder_3" not in index or (folder / "text_encoder_3").is_dir()
    gone = {} if there else dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipe = DiffusionPipeline.from_pretrained(folder, **gone)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def options(model: Path, out: Path, *more: Any) -> Any:
    given = [
        "--pretrained_model_name_or_path",
        model,
        "--forget",
        "cat",
        "--sets_dir",
        model.with_name(f"sets_{model.name}"),
        "--max_train_steps",
        2,
        *few(2),
        "--remember",
        "a dog",
        "a red car",
        "--validation_steps",
        0,
        "--fisher_images",
        2,
        "--fisher_timesteps",
        2,
        "--output_dir",
        out,
        "--cpu",
        "--resolution",
        size(model),
        *more,
    ]
    return parse(module("options").Unlearn, [str(a) for a in given])


def unlearn(model: Path, out: Path, *more: Any) -> Path:
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()):
        module("unlearn").unlearn(options(model, out, *more))
    return out


def prompted(model: Path, texts: list[str], tmp_path: Path, *more: Any) -> tuple[Any, Any, Any]:
    """The options with their guidance, what was looked at, and the `Prompted` that a run trains."""
    looked = look(model)
    args = looked.family.guided(options(model, tmp_path, *more).resolved(), looked.unet)
    told = module("sets").conditions(args, looked, model, texts, "cpu")
    kind = looked.family.kind("transformer")
    denoiser = kind.from_pretrained(model / "transformer")
    return args, looked, module("modules").Prompted(denoiser, told, looked.family).eval()
