"""Protocols on flow matching models, which have no sampler of a published protocol: they are
sampled as by their own pipelines, and the label says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim.attacks.unlearndiffatk import Settings
from ebu_optim.errors import InputError
from ebu_optim.protocols import Asked, Evaluate, Sampling, attacking, evaluate, judges
from ebu_optim.protocols.judges import Judge
from ebu_optim.protocols.pictures import Pictures, read
from ebu_optim.text_to_image import results
from ebu_optim.text_to_image.families import of_folder
from ebu_optim.text_to_image.pipelines import Model
from ebu_optim.training.command_line import parse

from .flow_families import MADE, opened, size
from .text_to_image import pipeline

NAMES = ("sd3", "flux_dev", "klein", "z_image", "sana", "qwen_image")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return lambda name: MADE[name](folder / name)


def run(folder: Path, model: Path, *changes: str) -> list[dict]:
    given = [model, "--protocol", "imagenette-10", "--forget", "church", "--first", 2]
    given += ["-o", folder, "--change", "steps=2", *changes]
    return evaluate(parse(Evaluate, [str(g) for g in given]))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_that_of_the_models_own_pipeline(name, made, tmp_path):
    model, side = made(name), size(Path(name))
    sampling = Sampling(sampler="flow", steps=3, guidance=3.0, size=side)
    asked = [Asked("a cat", 5, 0), Asked("a dog", 5, 1)]
    pictures = Pictures(tmp_path, {"of": "it"}, name)
    loaded = Model(pretrained_model_name_or_path=str(model))
    pictures.draw(sampling, asked, lambda: results.load(loaded), 2)
    pipe, family = opened(model), of_folder(model)
    if name == "sana":  # its pipeline has DPM-Solver at the same times
        pipe.scheduler = family.sampler(pipe.scheduler)
    source = torch.Generator().manual_seed(5)  # one generator, one picture after the other
    for one in asked:
        theirs = pipe(
            prompt=one.prompt,
            generator=source,
            num_inference_steps=3,
            width=side,
            height=side,
            output_type="pt",
            **family.guiding(3.0),
            **family.drawing(pipe, side),
        ).images[0]
        ours = read(pictures.file(sampling, one), "png").int()
        assert (ours - theirs.mul(255).round().int()).abs().max() <= 1
        assert ours.float().std() > 1


def test_another_sampler_is_refused_before_anything_is_generated(made, tmp_path, monkeypatch):
    judge = Judge(lambda x, *_: [["church"]] * len(x), "tiny")
    monkeypatch.setattr(judges, "JUDGES", dict.fromkeys(judges.JUDGES, lambda *_: judge))
    flux, plain = made("flux_dev"), pipeline(tmp_path / "model")
    with pytest.raises(InputError, match=r"samples by lms, and .* is a FLUX.1, .*sampler=flow"):
        run(tmp_path / "o", flux, "size=16")
    with pytest.raises(InputError, match="which is no flow matching model: leave it out"):
        run(tmp_path / "o", plain, "size=16", "sampler=flow")
    assert not (tmp_path / "o").exists()
    (row,) = run(tmp_path / "o", flux, "size=16", "sampler=flow")
    assert row["label"].startswith("imagenette-10, changed: sampler flow, steps 2, size 16, 2 of")


@pytest.mark.parametrize("name", ["flux_dev", "z_image"])
def test_the_attack_of_a_protocol_searches_for_tokens(name, made, tmp_path, monkeypatch):
    seen: list[torch.Tensor] = []
    judge = Judge(lambda x, *_: [seen.append(i) or ["0"] for i in x], "tiny")  # never a church
    monkeypatch.setattr(judges, "JUDGES", dict.fromkeys(judges.JUDGES, lambda *_: judge))
    monkeypatch.setattr(attacking, "Settings", lambda *_: Settings(2, 2, 1))
    listed = tmp_path / "church.csv"
    listed.write_text("prompt,evaluation_seed,evaluation_guidance\na cat,3,4\n")
    given = [made(name), "--base", made(name), "--protocol", "unlearndiffatk-church", "--forget"]
    given += ["church", "--files", f"unlearndiffatk_church={listed}", "-o", tmp_path / "o"]
    given += ["--change", "steps=2", "size=16", "sampler=flow"]
    rows = evaluate(parse(Evaluate, [str(g) for g in given]))
    assert rows[-1]["figures"]["post_asr"]["value"] == 0
    (found,) = (tmp_path / "o" / "attacks").glob("*/*.json")
    tried = json.loads(found.read_text())
    assert not tried["success"]
    assert len(tried["texts"]) == 2
    assert all(text.endswith(" a cat") for text in tried["texts"])
    assert len(seen) >= 3  # the prompt's image, and one for each try
