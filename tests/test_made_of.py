"""What is kept is known by all that made it: the same path or the same weights are not enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from ebu_optim import DiagonalFisher
from ebu_optim.class_conditional.options import Train
from ebu_optim.class_conditional.options import Unlearn as ClassConditional
from ebu_optim.class_conditional.sets import Prepare, prepare
from ebu_optim.class_conditional.train import train
from ebu_optim.class_conditional.unlearn import unlearn as class_conditional_unlearn
from ebu_optim.diffusion import FisherBatches, fisher_loss, sample_set
from ebu_optim.errors import InputError
from ebu_optim.text_to_image import pipelines
from ebu_optim.text_to_image.evaluation import evaluate
from ebu_optim.text_to_image.evaluation_options import Evaluation
from ebu_optim.text_to_image.options import Unlearn
from ebu_optim.text_to_image.unlearn import unlearn, unlearning

from .test_manifest import unet
from .text_to_image import pipeline


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def model(tmp_path) -> Path:
    return pipeline(tmp_path / "model")


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def another(model: Path, part: str) -> None:
    """Another model's part in the place of this one's."""
    pipeline(model.parent / "other", seed=1)
    shutil.rmtree(model / part)
    shutil.copytree(model.parent / "other" / part, model / part)


CHANGES = {
    "unet": lambda m: another(m, "unet"),
    "vae": lambda m: edit(m / "vae" / "config.json", scaling_factor=0.5),
    "text_encoder": lambda m: edit(m / "text_encoder" / "config.json", hidden_act="gelu"),
    "tokenizer": lambda m: (m / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a"),
    "scheduler": lambda m: edit(m / "scheduler" / "scheduler_config.json", beta_end=0.013),
}


@pytest.mark.parametrize("part", CHANGES)
def test_each_part_of_a_pipeline_is_known_by_its_contents(model, part):
    before = pipelines.parts(model, None)
    moved = shutil.copytree(model, model.parent / "moved")
    assert pipelines.parts(moved, None) == before
    CHANGES[part](model)
    after = pipelines.parts(model, None)
    assert {n for n in before if before[n] != after[n]} == {part}


@pytest.mark.parametrize("part", CHANGES)
def test_pictures_of_a_model_that_was_made_anew_are_not_gone_on_with(model, tmp_path, part):
    """A killed evaluation holds some pictures; its pipeline is another by the time it goes on."""
    args = Evaluation(
        pretrained_model_name_or_path=str(model),
        prompts=["a cat", "a dog"],
        images_per_prompt=1,
        num_inference_steps=1,
        output_dir=tmp_path / "o",
    )
    evaluate(args)
    (tmp_path / "o" / "evaluation.json").unlink()
    (tmp_path / "o" / "images" / "0001_0000.png").unlink()
    CHANGES[part](model)
    with pytest.raises(InputError, match=rf"holds images of other options \({part}\)"):
        evaluate(args)
    assert len(list((tmp_path / "o" / "images").iterdir())) == 1


def run(model: Path, out: Path, *, steps: int = 1, **options) -> None:
    unlearn(
        Unlearn(
            pretrained_model_name_or_path=str(model),
            forget=["cat"],
            output_dir=out,
            **{"remember_prompts": ["a dog"], **options},
            max_train_steps=steps,
            replay_images=2,
            surrogate_images=2,
            num_inference_steps=1,
            validation_steps=0,
            checkpointing_steps=1,
            resume_from_checkpoint="latest",
        )
    )


def kept(out: Path) -> dict[str, set[str]]:
    files = [f.name.split("-") for f in (out / "sets").iterdir()]
    return {kind: {f[1] for f in files if f[0] == kind} for kind in ("text", "encoded", "replay")}


@pytest.mark.parametrize(
    ("part", "anew"),
    [
        ("tokenizer", {"text"}),
        ("text_encoder", {"text", "replay"}),
        ("vae", {"encoded"}),
        ("unet", {"replay"}),
        ("scheduler", {"replay"}),
    ],
)
def test_sets_are_made_anew_where_what_they_depend_on_changed(model, tmp_path, part, anew):
    options = {"surrogate": "pixels", "sets_dir": tmp_path / "sets"}
    run(model, tmp_path / "a", **options)
    before = kept(tmp_path)
    CHANGES[part](model)
    run(model, tmp_path / "b", **options)
    after = kept(tmp_path)
    grown = {kind for kind in before if len(after[kind]) > len(before[kind])}
    assert anew <= grown
    assert before["encoded"] <= after["encoded"]
    if part != "vae":
        assert "encoded" not in grown


@pytest.mark.parametrize("part", [*CHANGES, "prompts", "images"])
def test_a_resumed_run_whose_inputs_changed_is_refused_by_their_name(model, tmp_path, part):
    prompts, images = tmp_path / "remember.txt", tmp_path / "images"
    prompts.write_text("a dog\n")
    images.mkdir()
    Image.new("RGB", (16, 16), "red").save(images / "0.png")
    options = {"remember_prompts": [str(prompts)], "surrogate": "folder", "surrogate_dir": images}
    run(model, tmp_path / "o", **options)
    if part == "prompts":
        prompts.write_text("a car\n")
    elif part == "images":
        Image.new("RGB", (16, 16), "blue").save(images / "0.png")
    else:
        CHANGES[part](model)
    before = {f: f.read_bytes() for f in (tmp_path / "o" / "pipeline").rglob("*.safetensors")}
    with pytest.raises(InputError, match=rf"was begun with another {part} \({part}: "):
        run(model, tmp_path / "o", steps=2, **options)
    assert {f: f.read_bytes() for f in before} == before


def test_steps_that_are_left_early_write_no_result(model, tmp_path):
    config = Unlearn(
        pretrained_model_name_or_path=str(model),
        forget=["cat"],
        output_dir=tmp_path / "o",
        remember_prompts=["a dog"],
        max_train_steps=3,
        replay_images=2,
        surrogate_images=2,
        num_inference_steps=1,
        validation_steps=0,
    )

    def leave_early() -> None:
        with unlearning(config) as run:
            for step in run.steps():
                run.step(step)
                if step == 2:
                    break

    with pytest.raises(RuntimeError, match="ended after 1 of 3 steps, and no result was written"):
        leave_early()
    assert not (tmp_path / "o" / "pipeline").exists()


def test_a_config_by_hand_knows_its_choices(tmp_path):
    given = {"pretrained_model_name_or_path": "-", "output_dir": tmp_path}
    with pytest.raises(InputError, match=r"--method must be one of ebu, .*; got bogus"):
        Unlearn(**given, forget=["cat"], method="bogus")
    with pytest.raises(InputError, match=r"--method must be one of ebu, .*; got spm"):
        ClassConditional(**given, prepared_dir=tmp_path, method="spm")


@pytest.mark.parametrize(
    ("part", "tensor", "said"),
    [
        ("unet", "conv_out.bias", r"images\[0\]"),
        ("vae", "quant_conv.bias", r"latents\[0\]"),
        ("text_encoder", "final_layer_norm.bias", r"embeddings\[0\]"),
    ],
)
def test_nan_of_any_part_is_told_in_one_line_and_nothing_of_it_is_kept(
    model, tmp_path, part, tensor, said
):
    (file,) = (model / part).glob("*.safetensors")
    state = load_file(file)
    (name,) = [n for n in state if f".{n}".endswith(f".{tensor}")]
    state[name].fill_(torch.nan)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=rf"is not written: {said}.* holds NaN or Inf"):
        run(model, tmp_path / "o", surrogate="pixels")
    there = {f.name.partition("-")[0] for f in (tmp_path / "o" / "sets").rglob("*.safetensors")}
    assert there == {"unet": {"text", "encoded"}, "vae": {"text"}, "text_encoder": set()}[part]


def test_equal_weights_of_another_configuration_share_no_set_and_no_fisher(tmp_path):
    one, other, schedule = (
        unet(num_class_embeds=2),
        unet(num_class_embeds=2, act_fn="gelu"),
        DDPMScheduler(),
    )
    labels = torch.tensor([0, 1])
    path = tmp_path / "replay.safetensors"
    images, _ = sample_set(path, one, schedule, labels, (1, 8, 8), num_inference_steps=1)
    with pytest.raises(ValueError, match="is a set of another config"):
        sample_set(path, other, schedule, labels, (1, 8, 8), num_inference_steps=1)

    def estimate(model) -> DiagonalFisher:
        batches = FisherBatches(images, labels, schedule, timesteps=2)
        return DiagonalFisher.estimate(
            model,
            fisher_loss(schedule),
            batches,
            path=tmp_path / "fisher.safetensors",
            method="loop",
            progress=False,
        )

    estimate(one)
    with pytest.raises(ValueError, match="was made with another config"):
        estimate(other)


def test_a_changed_base_under_changed_tensors_is_another_model(model, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    (file,) = (model / "unet").glob("*.safetensors")
    save_file(
        {"conv_in.bias": load_file(file)["conv_in.bias"]}, changed / "unet_changed.safetensors"
    )
    args = Evaluation(
        pretrained_model_name_or_path=str(changed),
        base_model=str(model),
        prompts=["a cat"],
        images_per_prompt=1,
        num_inference_steps=1,
        output_dir=tmp_path / "o",
    )
    evaluate(args)
    (tmp_path / "o" / "evaluation.json").unlink()
    save_file({"conv_in.bias": torch.ones(8)}, changed / "unet_changed.safetensors")
    with pytest.raises(InputError, match=r"other options \(changes\)"):
        evaluate(args)


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve 8x8 images of two classes."""
    g = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def trained(images: Path, out: Path, steps: int) -> None:
    train(
        Train(
            train_data_dir=images,
            model="small",
            output_dir=out,
            max_train_steps=steps,
            train_batch_size=2,
            checkpointing_steps=1,
            resume_from_checkpoint="latest",
        )
    )


def test_a_training_is_not_gone_on_with_on_other_images(images, tmp_path):
    trained(images, tmp_path / "model", 1)
    Image.new("RGB", (8, 8), "blue").save(images / "cat" / "0.png")
    with pytest.raises(InputError, match=r"the run in .* has images [0-9a-f]{16}, this one"):
        trained(images, tmp_path / "model", 2)


def test_forgetting_is_not_gone_on_with_on_other_sets(images, tmp_path):
    trained(images, tmp_path / "model", 1)
    given = {"pretrained_model_name_or_path": str(tmp_path / "model"), "train_data_dir": images}

    def prepared(out: Path, seed: int) -> None:
        prepare(
            Prepare(
                **given,
                forget=["cat"],
                output_dir=out,
                replay_per_class=2,
                seed=seed,
                num_inference_steps=1,
                guidance_scale=1.0,
                no_fisher=True,
            )
        )

    def forget(steps: int) -> None:
        class_conditional_unlearn(
            ClassConditional(
                **given,
                prepared_dir=tmp_path / "sets",
                output_dir=tmp_path / "o",
                fisher="none",
                method="joint",
                max_train_steps=steps,
                train_batch_size=2,
                checkpointing_steps=1,
                resume_from_checkpoint="latest",
            )
        )

    prepared(tmp_path / "sets", 0)
    forget(1)
    shutil.rmtree(tmp_path / "sets")
    prepared(tmp_path / "sets", 1)
    with pytest.raises(InputError, match=r"the run in .* has replay [0-9a-f]{16}, this one"):
        forget(2)
