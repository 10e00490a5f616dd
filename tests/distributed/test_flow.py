"""Two processes that share a run of flow matching do what one with their batch does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5", reason="the tiny tokenizers are made as of 5")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

import diffusers

if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("this diffusers has no FLUX.2 klein", allow_module_level=True)

from safetensors.torch import load_file

from ebu_optim.takedown import evidence

from ..flow_families import MADE
from .flow import train
from .launch import launch

NAMES = ["sd3", "flux_dev", "klein", "z_image"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in NAMES:
        MADE[name](folder / name)
    done = launch(2, "flow", folder, *NAMES)
    assert not any(done.codes), done.said
    return folder


def weights(file: Path) -> torch.Tensor:
    return torch.cat([t.flatten() for _, t in sorted(load_file(file).items())])


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_with_their_batch(name, two):
    file = Path("transformer") / "diffusion_pytorch_model.safetensors"
    one = weights(train(two, name) / "pipeline" / file)
    out = two / f"{name}__2"
    assert evidence.verify(out) == []
    moved = one - weights(two / name / file)
    assert moved.abs().max() > 1e-3
    apart = one - weights(out / "pipeline" / file)
    assert apart.norm() < 1e-3 * moved.norm()


def test_two_processes_train_one_lora(two):
    file = Path("lora") / "pytorch_lora_weights.safetensors"
    one = weights(train(two, "sd3", train_modules="lora", save_as="lora") / file)
    apart = one - weights(two / "sd3_train_modules_save_as_2" / file)
    assert apart.norm() < 1e-3 * one.norm()


def test_quantized_weights_are_of_one_process(two):
    for rank in range(2):
        said = json.loads((two / f"said_{rank}.json").read_text())
        assert said == (
            "--quantize int8: 2 processes cannot share quantized weights; start one"
        )
