"""unlearn.py of Stable Diffusion on a pipeline with random weights, and what it changed."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ..scripts import run_script
from ..text_to_image import few

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "stable_diffusion"
SCRIPT = SCRIPTS / "unlearn.py"
PAGE = ROOT / "docs" / "stable_diffusion.md"


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.text_to_image")


def run(*args, script: Path = SCRIPT) -> tuple[int, str]:
    return run_script(script, *args)


def succeed(*args, **options) -> str:
    code, said = run(*args, **options)
    assert code == 0, said
    return said


ADAPTERS = ["ebu", "spm"]
REQUIRED = ("--pretrained_model_name_or_path", "-", "--forget", "cat", "--output_dir", "-")
SMALL = [
    *few(4),
    "--remember",
    "a dog",
    "a red car",
    "",
]
PICTURES = [
    "--validation_steps",
    2,
    "--validation_inference_steps",
    2,
    "--num_validation_images",
    1,
]


def unlearn(made: Path, out: Path, *more, base: str = "base", pictures: bool = False) -> list:
    return [
        "--pretrained_model_name_or_path",
        made / base,
        "--forget",
        "cat",
        "--sets_dir",
        made / f"sets_{base}",
        "--max_train_steps",
        2,
        *SMALL,
        *(PICTURES if pictures else ["--validation_steps", 0]),
        "--output_dir",
        out,
        *more,
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def moved(made: Path, out: Path, base: str = "base") -> set[str]:
    a, b = weights(made / base), weights(out / "pipeline")
    assert a.keys() == b.keys()
    return {n for n in a if not torch.equal(a[n], b[n])}


def drawn(pipe: StableDiffusionPipeline, prompt: str = "a cat") -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images


def names(kind: str, unet) -> set[str]:
    module("modules").choose(unet, SimpleNamespace(method="ebu_added", train_modules=kind))
    return {n for n, p in unet.named_parameters() if p.requires_grad}


def hub_error(name: str):
    import huggingface_hub.errors as errors

    # what the hub's client is made of differs between its versions
    response = SimpleNamespace(headers={}, request=None, status_code=401)
    return getattr(errors, name)(name, response=response)
