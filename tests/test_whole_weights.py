"""Weights that lack a tensor, or hold another one, are refused where they are read: libraries fill
the gap with noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ebu_optim.class_conditional import models
from ebu_optim.errors import InputError
from ebu_optim.text_to_image import pipelines, results
from ebu_optim.text_to_image.pipelines import Model

from .models import schedule, tiny_unet
from .text_to_image import pipeline


def spoil(folder: Path, how: str) -> str:
    """Takes the first tensor away, or its shape; returns its name."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    name = min(state)
    if how == "lacks":
        del state[name]
    else:
        state[name] = state[name].flatten()[:1].clone()
    with safe_open(file, "pt") as f:
        meta = f.metadata()
    save_file(state, file, meta)
    return name


@pytest.mark.parametrize("how", ["lacks", "reshapes"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_part_of_a_pipeline_is_whole_or_refused(part, how, tmp_path):
    folder = pipeline(tmp_path / "model")
    whole = Model(pretrained_model_name_or_path=str(folder))
    results.load(whole)
    spoil(folder / part, how)
    for read in (lambda: results.load(whole), lambda: pipelines.assembled(folder, None)):
        with pytest.raises(InputError, match=rf"model/{part}: ") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_a_class_conditional_model_is_whole_or_refused(tmp_path):
    info = {"classes": ["a", "b", "c", "d"], "shape": [1, 8, 8]}
    models.save_unet(tmp_path, tiny_unet(), schedule(), info, "card")
    models.load_unet(str(tmp_path))
    spoil(tmp_path / "unet", "lacks")
    with pytest.raises(InputError, match="unet: "):
        models.load_unet(str(tmp_path))


def test_what_is_assembled_is_float32_whatever_was_saved(tmp_path):
    folder = pipeline(tmp_path / "model")
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    pipe = pipelines.assembled(folder, None)
    found = {p.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()}
    assert found == {torch.float32}
