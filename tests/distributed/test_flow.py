"""Two processes that share a run of flow matching do what one with their batch does."""

from __future__ import annotations

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
from ..test_quantized import missing
from .flow import RUNS, train
from .launch import launch


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in {name for name, _ in RUNS.values()}:
        MADE[name](folder / name)
    done = launch(2, "flow", folder, *(run for run in RUNS if run != "int8" or not missing("int8")))
    assert not any(done.codes), done.said
    return folder


def weights(folder: Path) -> torch.Tensor:
    (file,) = folder.glob("*.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(load_file(file).items())])


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_one_with_their_batch(run, two):
    if run == "int8" and missing(run):
        pytest.skip(missing(run))
    (name, options), out = RUNS[run], two / f"{run}_by_2"
    result = "lora" if options else "pipeline/transformer"
    one = weights(train(two, run) / result)
    moved = one if options else one - weights(two / name / "transformer")
    assert moved.abs().max() > 1e-3
    assert (one - weights(out / result)).norm() < 1e-3 * moved.norm()
    assert evidence.verify(out) == []
