"""What the report of `ebu forget` takes in memory, and that it is counted."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline

from ebu_optim.takedown import pictures, planning
from ebu_optim.takedown.options import Forget
from ebu_optim.text_to_image import memory

from .single_files import folder


def test_memory_for_the_pictures_of_the_report_is_counted(tmp_path):
    """They are drawn with the whole pipeline, whatever little of it was trained."""
    base = folder("sd1", tmp_path / "base")

    def counted(**more):
        args = Forget(
            pretrained_model_name_or_path=str(base),
            forget=["cat"],
            output_dir=tmp_path / "out",
            remember_prompts=["a dog"],
            forget_templates=["{}"],
            **{"mixed_precision": "no", "train_modules": "lora", "evidence_images": 4, **more},
        ).resolved()
        return planning.check(args).cost.phases

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pictures = counted()["report"]
    weights = {
        "frozen weights": pipe.unet,
        "text encoders": pipe.text_encoder,
        "VAE": pipe.vae,
    }
    for what, part in weights.items():
        assert pictures.pop(what) == 4 * sum(p.numel() for p in part.parameters())
    (there,) = pictures.values()
    decoding = memory.alive(pipe.vae, lambda: pipe.vae.decode(torch.zeros(4, 4, 8, 8)))
    assert there >= 0.9 * decoding
    assert there == 4 * counted(sample_batch_size=1)["report"]["activations"]
    assert "report" not in counted(evidence_images=0)


def test_without_pictures_no_pipeline_is_opened_for_them(tmp_path, monkeypatch):
    base = folder("sd1", tmp_path / "base")
    args = Forget(
        pretrained_model_name_or_path=str(base),
        forget=["cat"],
        output_dir=tmp_path / "out",
        forget_templates=["{}"],
        remember_prompts=["a dog"],
        evidence_images=0,
    ).resolved()
    (tmp_path / "out").mkdir()
    said = dict.fromkeys(("instead", "settings", "train_modules", "seconds", "made_of"), "")
    (tmp_path / "out" / "unlearn.json").write_text(json.dumps(said))
    monkeypatch.setattr(pictures, "draw", None)
    figures = pictures.report(args)
    assert all("not_computed" in value for value in figures.values())
    assert (tmp_path / "out" / "report" / "report.html").is_file()
