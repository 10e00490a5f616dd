"""unlearn.py as a user runs it, a few steps: every method, option and loss."""

from __future__ import annotations

import gc
import io
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import (
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image

from ebu_optim.files import load_tensors
from ebu_optim.text_to_image.unlearn import unlearn as by_package
from ebu_optim.training.command_line import parse

from ..scripts import by_both
from ..steps import HAS_NAMES
from ..text_to_image import LENGTH
from ..torchjd import WEIGHTINGS, runnable
from .script import ADAPTERS, SCRIPT, drawn, module, moved, names, run, succeed, unlearn, weights

# method, options, how the names of all that moves look
RUNS = {
    "ebu": ([], "attn2."),
    "ebu_routed": (
        [
            "--train_modules",
            "full",
            "--alpha",
            0.5,
            "--surrogate",
            "gaussian",
            "--remember_loss",
            "distill",
            "--fisher",
            "none",
        ],
        "",
    ),
    "ebu_without_alignment": (["--remember_loss", "crossed", "--surrogate", "analytic"], "attn2."),
    "joint": (
        ["--train_modules", "selfattn", "--surrogate", "pixels", "--relearner_steps", 2],
        "attn1.",
    ),
    "sa": (["--fisher_images", 2, "--fisher_timesteps", 2, "--condition_noise", 1], "attn2."),
    "salun": (
        [
            "--surrogate_prompt",
            "dog",
            "--remember",
            "a red car",
            "--gradient_accumulation_steps",
            2,
            "--relearner_steps",
            1,
        ],
        "attn2.",
    ),
    "esd": (
        ["--train_modules", "esd-x-strict", "--relearner_steps", 1],
        ("attn2.to_k.", "attn2.to_v."),
    ),
    "gradient_ascent": (
        ["--gradient_checkpointing", "--method_options", '{"remember_weight": 0.1}'],
        "attn2.",
    ),
    "ebu_replaced": (
        [
            "--forget_loss",
            "relabel",
            "--remember_loss",
            "crossed",
            "--adversary_steps",
            2,
            "--adversaries",
            2,
            "--adversary_prompts",
            "a cat",
            "--surrogate_prompt",
            "dog",
            "--remember",
            "a red car",
        ],
        "attn2.",
    ),
    "advunlearn": (["--adversary_steps", 2, "--remember_loss", "distill"], "attn2."),
    "uce": (["--surrogate_prompt", "dog"], ("attn2.to_k", "attn2.to_v")),
    "rece": (["--surrogate_prompt", "dog"], ("attn2.to_k", "attn2.to_v")),
    "speed": (["--surrogate_prompt", "dog", "--remember", "a red car", ""], "attn2.to_v"),
    **{
        m: ([], "attn2.")
        for m in (
            "fine_tune",
            "erasediff",
            "pcgrad",
            "random_masks",
            "restricted_gradient",
            "gu",
            "gru",
            "sago",
            "aegis",
            "ebu_without_forget",
            "ebu_without_remember",
            "ebu_without_mitigation",
            "ebu_full_alignment",
            "ebu_blend_remember",
            "ebu_blend_forget",
            "ebu_blend_equal",
        )
    },
}
SCOPE = json.dumps({"scope": "module" if HAS_NAMES else "tensor"})
RUNS |= {"munba": (["--method_options", SCOPE], "attn2.")}
# of the weightings of TorchJD one that needs torchjd alone; the others go the same way
RUNS |= {"mgda": (["--method_options", '{"scope": "tensor"}'], "attn2.")}


@pytest.mark.parametrize("method", runnable(RUNS))
def test_a_method_trains_what_it_names(method, made, tmp_path):
    options, where = RUNS[method]
    said = succeed(*unlearn(made, tmp_path / "o", "--method", method, *options))
    found = moved(made, tmp_path / "o")
    assert found
    names = (where,) if isinstance(where, str) else where
    assert all(any(w in n for w in names) for n in found)
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["forget"] == ["cat"]
    assert f"trained: {report['train_modules']}, {report['trained']:,} of" in said
    phases = dict(report["memory_counted"])
    assert phases.pop("peak") == max(sum(rows.values()) for rows in phases.values())
    card = (tmp_path / "o" / "pipeline" / "README.md").read_text()
    assert "without `cat`" in card
    assert "do not prove that it is gone" in card
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "pipeline")
    assert drawn(pipe).shape == (1, 16, 16, 3)


def test_every_method_is_run():
    script = module("options")
    ours, theirs = (
        {script.ALIASES.get(m, m) for m in methods}
        for methods in ([*RUNS, *ADAPTERS], script.METHODS)
    )
    assert ours | WEIGHTINGS.keys() == theirs


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "ebu", "--remember_loss", "crossed"],
        ["--method", "esd"],
        ["--method", "esd", "--esd_variant", "released", "--train_modules", "esd-u"],
    ],
    ids=["ebu", "esd", "esd_released"],
)
def test_v_prediction(options, made, tmp_path):
    succeed(*unlearn(made, tmp_path / "o", *options, base="base2"))
    assert moved(made, tmp_path / "o", "base2")
    scheduler = json.loads(
        (tmp_path / "o" / "pipeline" / "scheduler" / "scheduler_config.json").read_text()
    )
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    "more",
    [
        ("--gradient_accumulation_steps", 2),
        ("--method", "salun", "--surrogate_prompt", "dog"),
        ("--method", "esd"),
        ("--method", "fine_tune"),
    ],
)
def test_the_loop_in_sight_is_the_packages(more, made, tmp_path):
    argv = unlearn(made, tmp_path, "--logging_steps", 1, *more)
    config = parse(module("options").Unlearn, list(map(str, argv)))
    script, ours = by_both(SCRIPT, by_package, config)
    a, b = weights(script / "pipeline"), weights(ours / "pipeline")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert moved(made, script)
    assert (script / "log.jsonl").read_text() == (ours / "log.jsonl").read_text()


def test_a_resumed_run_is_the_unbroken_one(made, tmp_path):
    both = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--method", "ebu"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeed(*unlearn(made, whole, *both, pictures=True))
    first = unlearn(made, parts, *both, "--sets_dir", parts / "sets", pictures=True)
    first[first.index("--max_train_steps") + 1] = 2
    first[first.index("--max_train_steps", first.index("--max_train_steps") + 1) + 1] = 2
    succeed(*first)
    code, said = run(*unlearn(made, parts, *both, pictures=True))
    assert code == 2
    assert "holds a run: resume it with --resume_from_checkpoint" in said
    parts = parts.rename(tmp_path / "moved")  # with its sets, which are found there
    sets = {p.name: p.stat().st_mtime_ns for p in (parts / "sets").iterdir()}
    there = json.loads((parts / "run.json").read_text())
    for name in ("adversaries", "adversary_learning_rate", "adversary_prompts", "adversary_steps"):
        del there["options"][name]  # as an earlier version left it
    (parts / "run.json").write_text(json.dumps(there))
    said = succeed(
        *unlearn(
            made,
            parts,
            *both,
            "--sets_dir",
            parts / "sets",
            "--gradient_checkpointing",
            "--resume_from_checkpoint",
            "latest",
            pictures=True,
        )
    )
    assert "resuming after step 2" in said
    assert {p.name: p.stat().st_mtime_ns for p in (parts / "sets").iterdir()} == sets
    a, b = weights(whole / "pipeline"), weights(parts / "pipeline")
    assert all(torch.equal(a[n], b[n]) for n in a)
    for step in (0, 2, 4):
        file = f"validation/step_{step:08d}.png"
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    assert Image.open(whole / "validation" / "step_00000004.png").size == (16, 4 * 16)


def test_figures_and_validation_images_go_to_tensorboard(made, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard comes with the extra test")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed(
        *unlearn(
            made, tmp_path / "o", "--report_to", "tensorboard", "--logging_steps", 1, pictures=True
        )
    )
    files = (tmp_path / "o" / "logs").rglob("events*")
    found = [EventAccumulator(str(file)).Reload() for file in files]
    (events,) = [e for e in found if "loss_forget" in e.Tags()["scalars"]]
    rows = [json.loads(r) for r in (tmp_path / "o" / "log.jsonl").read_text().splitlines()]
    losses = events.Scalars("loss_forget")
    assert [e.step for e in losses] == [r["step"] for r in rows] == [1, 2]
    assert [e.value for e in losses] == pytest.approx([r["loss_forget"] for r in rows])
    images = events.Images("validation")
    assert [e.step for e in images] == [0, 2]
    row = np.asarray(Image.open(io.BytesIO(images[1].encoded_image_string)))
    file = Image.open(tmp_path / "o" / "validation" / "step_00000002.png")
    # four prompts, beside one another there and below one another here
    assert (np.concatenate(np.split(row, 4, axis=1)) == np.asarray(file)).all()


def test_vae_and_text_encoder_are_gone_while_it_trains(made, tmp_path, monkeypatch):
    conditions, validation, training = map(module, ("conditions", "validation", ".training"))
    held, alive, step_of = [], [], training.unlearning_step

    def loads(kind, *args, of=conditions.load):
        part = of(kind, *args)
        held.append((kind.__name__, weakref.ref(part)))
        return part

    def step(*args):
        gc.collect()
        alive.extend(name for name, part in held if part() is not None)
        return step_of(*args)

    for user in (conditions, validation):
        monkeypatch.setattr(user, "load", loads)
    monkeypatch.setattr(training, "unlearning_step", step)
    succeed(
        *unlearn(
            made,
            tmp_path / "o",
            "--sets_dir",
            tmp_path / "sets",
            "--surrogate",
            "pixels",
            pictures=True,
        )
    )
    # embeddings, noise through the VAE, two rows of pictures
    assert [name for name, _ in held] == ["CLIPTextModel", *["AutoencoderKL"] * 3]
    assert alive == []


def test_a_bf16_step_is_nearly_the_float32_one(made):
    modules, steps = module("modules"), []
    torch.manual_seed(0)
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([5, 300, 600, 900]), torch.randn(4, LENGTH, 16)
    for half in (False, True):
        unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
        chosen = names("xattn", unet)
        before = {n: p.detach().clone() for n, p in unet.named_parameters()}
        if half:
            modules.halve_frozen(unet, torch.bfloat16)
            for n, p in unet.named_parameters():
                norm = ".norm" in n or "norm_out." in n
                kept = torch.float32 if n in chosen or norm else torch.bfloat16
                assert p.dtype == kept, n
        opt = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            unet(*inputs).sample.square().mean().backward()
        opt.step()
        steps.append(
            torch.cat(
                [
                    (p.detach() - before[n]).flatten()
                    for n, p in unet.named_parameters()
                    if n in chosen
                ]
            )
        )
    whole, halved = steps
    assert 0 < (halved - whole).norm() < 0.05 * whole.norm()


def test_gradient_checkpointing_computes_again_and_the_same(made, tmp_path, monkeypatch):
    calls, forward = [0], BasicTransformerBlock.forward

    def counted(*args, **kwargs):
        calls[-1] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", counted)
    succeed(*unlearn(made, tmp_path / "sets"))  # makes them where they are not there yet
    for name, more in (("a", []), ("b", ["--gradient_checkpointing"])):
        calls.append(0)
        succeed(*unlearn(made, tmp_path / name, *more))
    assert calls[2] > calls[1] > 0
    a, b = (weights(tmp_path / n / "pipeline") for n in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_file_of_prompts_is_forgotten(made, tmp_path):
    (tmp_path / "gone.txt").write_text("# two\ncat\n\nperson in red\n")
    command = ["--forget", tmp_path / "gone.txt", "--forget_templates", "a photo of {}"]
    said = succeed(*unlearn(made, tmp_path / "o", *command, "--max_train_steps", 1))
    assert "forgets 'a photo of cat', 'a photo of person in red'" in said
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["forget"] == ["a photo of cat", "a photo of person in red"]


def test_sets_are_made_once_and_a_run_that_finds_them_is_the_same(made, tmp_path):
    sets = tmp_path / "sets"
    command = ["--sets_dir", sets, "--method", "sa", "--fisher_images", 2, "--fisher_timesteps", 2]
    succeed(*unlearn(made, tmp_path / "a", *command))
    before = {p.name: p.stat().st_mtime_ns for p in sets.iterdir()}
    assert {n.partition("-")[0] for n in before} == {"text", "replay", "surrogate", "fisher"}
    succeed(*unlearn(made, tmp_path / "b", *command))
    assert {p.name: p.stat().st_mtime_ns for p in sets.iterdir()} == before
    a, b = (weights(tmp_path / n / "pipeline") for n in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)
    labels = load_tensors(next(sets.glob("replay-*")))[0]["labels"]
    assert sorted(labels.tolist()) == [0, 0, 1, 2]
    # F and what is replayed stay where something else is forgotten
    other = unlearn(made, tmp_path / "d", *command)
    other[other.index("--forget") + 1] = "person"
    succeed(*other)
    added = {p.name.partition("-")[0] for p in sets.iterdir() if p.name not in before}
    assert added == {"text"}
    # what is sampled in other batches has other noise: another file, and no error
    less = ["--sample_batch_size", 2, "--max_train_steps", 1]
    succeed(*unlearn(made, tmp_path / "e", *command, *less))
    assert len(list(sets.glob("replay-*"))) == 2
    # other prompts have sets of their own
    succeed(*unlearn(made, tmp_path / "c", *command, "--remember", "a dog"))
    assert len(list(sets.glob("replay-*"))) == 3


def test_images_of_a_folder_as_surrogate_and_as_what_is_forgotten(made, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 18), (80 * i, 0, 0)).save(folder / f"{i}.png")
    sets = tmp_path / "sets"
    common = ["--sets_dir", sets, "--max_train_steps", 1]
    succeed(
        *unlearn(made, tmp_path / "a", *common, "--surrogate", "folder", "--surrogate_dir", folder)
    )
    succeed(
        *unlearn(
            made,
            tmp_path / "b",
            *common,
            "--method",
            "salun",
            "--forget_dir",
            folder,
            "--surrogate_prompt",
            "dog",
        )
    )
    (encoded,) = sets.glob("encoded-*")  # the same images
    latents = load_tensors(encoded)[0]["latents"]
    # in float32 whatever the run computes in: the file's name does not tell
    succeed(
        *unlearn(
            made,
            tmp_path / "c",
            "--sets_dir",
            tmp_path / "bf16",
            "--max_train_steps",
            1,
            "--surrogate",
            "folder",
            "--surrogate_dir",
            folder,
            "--mixed_precision",
            "bf16",
        )
    )
    assert torch.equal(load_tensors(tmp_path / "bf16" / encoded.name)[0]["latents"], latents)
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    x = torch.tensor([160.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(latents[2:], expected)


def test_each_prompt_becomes_the_surrogate_concept_in_its_own_template(made, tmp_path):
    from transformers import CLIPTokenizer

    Objectives, collect = (
        module("objectives").TextObjectives,
        module("prompts").collect,
    )

    words = CLIPTokenizer.from_pretrained(made / "base" / "tokenizer")
    (tmp_path / "templates.txt").write_text("# two\na {}\n{}\n")
    given = module("options").Unlearn(
        pretrained_model_name_or_path="m",
        output_dir=tmp_path / "out",
        forget=["cat", "red cat"],
        forget_templates=[str(tmp_path / "templates.txt")],
        surrogate_concept=["dog", "car"],
        remember_prompts=["a house"],
        train_batch_size=64,
    )
    texts = collect(given, words)

    def names(numbers):
        return [texts.texts[i] for i in numbers]

    assert names(texts.surrogate) == ["a dog", "a car", "dog", "car"]
    for prompt, others in {"a cat": ["a dog", "a car"], "red cat": ["dog", "car"]}.items():
        assert names(texts.instead[texts.texts.index(prompt)]) == others
    losses = object.__new__(Objectives)
    losses.args, losses.prompts, losses.device = given, texts, "cpu"
    torch.manual_seed(0)
    forgotten = torch.tensor(texts.forget).repeat(16)
    for label, other in zip(names(forgotten), names(losses.other(forgotten))):
        assert other.startswith("a ") == label.startswith("a ")
    shown = torch.tensor(texts.surrogate).repeat(16)
    asked = losses.asked(shown, torch.full_like(shown, texts.null))
    for image, label in zip(names(shown), names(asked)):
        assert label.startswith("a ") == image.startswith("a ")
    assert set(names(asked)) == {"a cat", "a red cat", "cat", "red cat"}
    # with prompts, or images of something else, any takes the place of any
    losses.args = replace(given, surrogate_concept=[])
    assert losses.asked(shown, forgotten) is forgotten
    plain = collect(replace(losses.args, surrogate_prompt=["dog", ""]), words)
    assert set(map(tuple, plain.instead.values())) == {tuple(plain.surrogate)}
    # each by its own: two may become the same
    each = replace(given, surrogate_pairing="each", surrogate_concept=["dog", "dog"])
    texts = collect(each, words)
    assert names(texts.surrogate) == ["a dog", "dog"]
    assert names(texts.instead[texts.texts.index("a red cat")]) == ["a dog"]
    texts = collect(replace(each, surrogate_concept=["dog", "car"]), words)
    for prompt, other in {"a cat": "a dog", "cat": "dog", "red cat": "car"}.items():
        assert names(texts.instead[texts.texts.index(prompt)]) == [other]

    for method in ("ebu", "salun"):
        succeed(*unlearn(made, tmp_path / method, "--method", method, "--surrogate_concept", "dog"))
    card = (tmp_path / "ebu" / "pipeline" / "README.md").read_text()
    assert "`dog` in the same words" in card


def test_a_variant_in_16_bits_at_another_resolution(made, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half" / "unet").glob("diffusion_pytorch_model.safetensors"))
    command = unlearn(
        made,
        tmp_path / "o",
        "--variant",
        "fp16",
        "--resolution",
        24,
        "--sets_dir",
        tmp_path / "sets",
        pictures=True,
    )
    command[1] = tmp_path / "half"
    succeed(*command)
    latents = load_tensors(next((tmp_path / "sets").glob("replay-*")))[0]["images"]
    assert latents.shape == (4, 4, 12, 12)
    assert Image.open(tmp_path / "o" / "validation" / "step_00000002.png").size == (24, 4 * 24)
    a, b = weights(tmp_path / "o" / "pipeline"), weights(made / "base")
    assert all(t.dtype == torch.float32 for t in a.values())
    assert all(torch.equal(a[n], b[n].half().float()) for n in a if "attn2" not in n)
