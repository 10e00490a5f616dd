"""examples/stable_diffusion as a user runs it, a few steps on a pipeline with random weights."""

from __future__ import annotations

import gc
import importlib
import io
import json
import re
import shutil
import sys
import weakref
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity

from ebu_optim.baselines import closed_forms
from ebu_optim.closed_form import gram, influential, invariants, rece, speed, uce
from ebu_optim.diffusion import Adversary
from ebu_optim.errors import InputError
from ebu_optim.files import load_tensors
from ebu_optim.text_to_image.families import Conditions
from ebu_optim.text_to_image.prompts import Prompts
from ebu_optim.text_to_image.unlearn import unlearn as by_package
from ebu_optim.training.command_line import parse

from .scripts import by_both, run_script
from .steps import HAS_NAMES, NAMES
from .text_to_image import LENGTH, pipeline
from .torchjd import WEIGHTINGS, runnable

ROOT = Path(__file__).parent.parent
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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """SD 1.x and SD 2.x in small."""
    out = tmp_path_factory.mktemp("text_to_image")
    pipeline(out / "base")
    pipeline(out / "base2", "v_prediction")
    return out


SMALL = [
    "--replay_images",
    4,
    "--surrogate_images",
    4,
    "--forget_images",
    4,
    "--num_inference_steps",
    2,
    "--guided_steps",
    3,
    "--learning_rate",
    1e-3,
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


# -- what it does -------------------------------------------------------------------------------

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
ADAPTERS = ["ebu", "spm"]


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


# -- what comes out -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_lora_draws_what_the_merged_pipeline_and_the_changed_tensors_draw(method, made, tmp_path):
    options = ["--method", method, "--learning_rate", 0.05]
    options += [
        "--relearner_steps",
        1,
        "--relearner_learning_rate",
        1e-3,
    ]  # the adapter alone moves
    if method == "ebu":
        options += [
            "--train_modules",
            "lora",
            "--rank",
            2,
            "--lora_alpha",
            6,
            "--lora_target_modules",
            "to_k",
            "attn2.to_v",
            "ff.net.2",
        ]
    for kind in ("lora", "pipeline", "changed"):
        succeed(*unlearn(made, tmp_path / kind, *options, "--save_as", kind))
    base = StableDiffusionPipeline.from_pretrained(made / "base")
    before = drawn(base)
    # by name: older versions of diffusers look it up on the hub
    base.load_lora_weights(
        tmp_path / "lora" / "lora", weight_name="pytorch_lora_weights.safetensors"
    )
    found = drawn(base)
    assert np.abs(found - before).max() > 1e-3
    whole = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline" / "pipeline")
    np.testing.assert_allclose(drawn(whole), found, atol=1e-5)
    for kind in ("lora", "pipeline", "changed"):  # by the lines of their cards
        np.testing.assert_allclose(loaded(tmp_path / kind / kind / "README.md"), found, atol=1e-5)
    tensors = load_file(tmp_path / "changed" / "changed" / "unet_changed.safetensors")
    partly = StableDiffusionPipeline.from_pretrained(made / "base")
    assert 0 < len(tensors) < len(partly.unet.state_dict())
    assert not partly.unet.load_state_dict(tensors, strict=False).unexpected_keys
    np.testing.assert_allclose(drawn(partly), drawn(whole), atol=1e-6)


def test_changed_tensors_in_16_bits(made, tmp_path):
    succeed(*unlearn(made, tmp_path / "o", "--save_as", "changed", "--save_precision", "fp16"))
    tensors = load_file(tmp_path / "o" / "changed" / "unet_changed.safetensors")
    assert all("attn2" in n and t.dtype == torch.float16 for n, t in tensors.items())
    assert not (tmp_path / "o" / "pipeline").exists()


def test_transport_of_two_spms_is_the_sum_of_the_papers_formula(made, tmp_path):
    folders = []
    for concept in ("cat", "red car"):
        out = tmp_path / concept.replace(" ", "_")
        command = unlearn(made, out, "--method", "spm", "--learning_rate", 0.05)
        command[command.index("--forget") + 1] = concept
        command[command.index("--remember") + 1 :][:3] = ["a dog", "a dog", "a dog"]
        succeed(*command)
        folders.append(out / "lora")
    transport = module("transport")
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    erased = transport.load(pipe, folders)
    m = transport.scale(pipe, erased, "a car")
    assert m[1] >= 0.5  # one of its two words
    assert m[0] != m[1]
    found = drawn(pipe, "a car")
    hand = StableDiffusionPipeline.from_pretrained(made / "base")
    state = hand.unet.state_dict()
    for folder, strength in zip(folders, m, strict=True):
        (file,) = folder.glob("*.safetensors")
        layers = load_file(file)
        ups = [n for n in layers if ".lora_B." in n]
        assert len(ups) == len(module("modules").spm_layers(hand.unet))
        for n in ups:
            up, down = layers[n], layers[n.replace(".lora_B.", ".lora_A.")]
            assert up.shape[1] == down.shape[0] == 1  # rank 1
            name = n.removeprefix("unet.").replace(".lora_B.", ".")
            delta = torch.einsum("o...,...i->oi", up.flatten(1), down.flatten(1))
            state[name] += strength * delta.view_as(state[name])
    hand.unet.load_state_dict(state)
    np.testing.assert_allclose(drawn(hand, "a car"), found, atol=1e-5)
    said = succeed(
        "--pretrained_model_name_or_path",
        made / "base",
        "--adapters",
        *folders,
        "--prompt",
        "a car",
        "a cat",
        "--num_inference_steps",
        2,
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "drawn",
        script=SCRIPTS / "transport.py",
    )
    assert f"'a car': erased_0 {m[0]:.2f}, erased_1 {m[1]:.2f}" in said
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


# -- the hub ------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The hub, replaced: what was asked of it, in order, and what is to fail."""
    import huggingface_hub

    asked: list[tuple] = []
    fails: dict[str, Exception] = {}

    def call(name: str, answer):
        def asks(*args, **kwargs):
            asked.append((name, args, kwargs))
            if name in fails:
                raise fails[name]
            return answer(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub, name, asks)

    def uploaded(*, folder_path, **_):
        asked.append(("holds", sorted(p.name for p in Path(folder_path).iterdir())))

    call("create_repo", lambda name, **_: SimpleNamespace(repo_id=f"me/{name.split('/')[-1]}"))
    call("model_info", lambda name: SimpleNamespace(private="public" not in name))
    call("upload_folder", uploaded)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_a_test")
    return SimpleNamespace(asked=asked, fails=fails)


def test_the_result_goes_to_the_hub_and_its_card_loads_it(hub, made, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import metadata_load

    out = tmp_path / "without_cat"
    said = succeed(
        *unlearn(made, out, "--push_to_hub", "--hub_private_repo", "--save_as", "changed")
    )
    assert "uploaded https://huggingface.co/me/without_cat" in said
    assert hub.asked[0] == ("create_repo", ("without_cat",), {"private": True, "exist_ok": True})
    (_, _, sent), holds = hub.asked[-2:]
    assert sent["repo_id"] == "me/without_cat"
    assert sent["folder_path"] == out / "changed"
    assert sent["commit_message"] == "Forgets cat (EBU added)"
    assert holds[1] == ["README.md", "unet_changed.safetensors", "unlearn.json"]
    assert "hf_of_a_test" not in (out / "run.json").read_text()
    card = out / "changed" / "README.md"
    assert metadata_load(card)["library_name"] == "diffusers"
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda name, file: out / name.replace("me/without_cat", "changed") / file,
    )
    assert str(made) not in card.read_text()
    before = drawn(StableDiffusionPipeline.from_pretrained(made / "base"))
    assert not np.allclose(loaded(card, made / "base"), before)


BASE = "<the base model>"


def loaded(card: Path, base: Path | None = None) -> np.ndarray:
    """What the pipeline of a card's own lines draws."""
    place = "<this repository or folder>"
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    namespace: dict = {}
    exec(code.replace(place, str(card.parent)).replace(BASE, str(base)), namespace)  # noqa: S102
    return drawn(namespace["pipe"])


@pytest.mark.parametrize(
    ("asked", "fails", "message"),
    [
        (
            [],
            {"create_repo": OSError("403 Forbidden")},
            "--hub_model_id o cannot be created on the hub (OSError: 403 Forbidden)",
        ),
        (["--hub_model_id", "a/b/c"], {}, "--hub_model_id a/b/c: Repo id must be in the form"),
        (
            ["--hub_private_repo", "--hub_model_id", "me/public"],
            {},
            "--hub_private_repo: me/public already exists on the hub and is public",
        ),
    ],
)
def test_what_the_hub_would_refuse_is_told_before_any_time_is_spent(
    asked, fails, message, hub, made, tmp_path
):
    hub.fails.update(fails)
    sets = tmp_path / "sets"
    code, said = run(*unlearn(made, tmp_path / "o", "--sets_dir", sets, "--push_to_hub", *asked))
    assert code == 2
    assert message in said, said
    assert not sets.exists()
    assert "upload_folder" not in [call[0] for call in hub.asked]


def test_without_a_token_nothing_begins(hub, made, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    code, said = run(*unlearn(made, tmp_path / "o", "--push_to_hub"))
    assert code == 2
    assert "--push_to_hub: this machine has no token: log in with `hf auth login`" in said
    assert hub.asked == []
    assert not (tmp_path / "o").exists()


def test_a_failed_upload_loses_nothing_and_says_how_to_go_on(hub, made, tmp_path):
    hub.fails["upload_folder"] = ConnectionError("the line is gone\nand more")
    command = unlearn(made, tmp_path / "o", "--push_to_hub", "--hub_model_id", "me/x")
    code, said = run(*command)
    assert code == 2
    assert "the upload to me/x failed (ConnectionError: the line is gone)" in said
    assert f"\n  hf upload me/x {tmp_path / 'o' / 'pipeline'}\n" in said
    StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "pipeline")
    hub.fails.clear()
    said = succeed(*command, "--resume_from_checkpoint", "latest")
    assert "resuming after step 2" in said
    assert "uploaded https://huggingface.co/me/x" in said


def test_a_finished_run_is_uploaded_with_the_card_as_it_was_edited(hub, made, tmp_path):
    out = tmp_path / "o"
    command = unlearn(made, out, "--save_as", "changed", "--checkpointing_steps", 1)
    again = [*command, "--resume_from_checkpoint", "latest"]
    upload = [*again, "--push_to_hub", "--hub_model_id", "me/x"]
    succeed(*command)
    folder = out / "changed"
    card, file = folder / "README.md", folder / "unet_changed.safetensors"
    first = file.stat().st_mtime_ns
    # nobody edited it: its lines load from the hub, and name no folder of this machine
    assert f"{folder} was already saved, with its README.md\nuploaded" in succeed(*upload)
    assert 'hf_hub_download("me/x"' in card.read_text()
    assert str(made) not in card.read_text()
    card.write_text(card.read_text() + "\nMeasured: CLIP score 0.31.\n")
    edited = card.read_text()
    succeed(*upload)
    assert card.read_text() == edited
    assert file.stat().st_mtime_ns == first
    # what is not whole, or of other steps, is saved again
    shutil.copytree(folder, tmp_path / "old")
    file.unlink()
    assert f"saved {folder}\n" in succeed(*again)
    assert file.exists()
    succeed(*again, "--max_train_steps", 3)
    newer = load_file(file)
    shutil.rmtree(folder)
    (tmp_path / "old").rename(folder)
    assert f"saved {folder}\n" in succeed(*again, "--max_train_steps", 3)
    assert all(torch.equal(t, newer[n]) for n, t in load_file(file).items())


def test_a_card_has_the_licence_of_the_base_and_names_it(tmp_path):
    card = module("card")
    said = {
        "forget": ["cat"],
        "title": "EBU added",
        "seconds": 1.0,
        "train_modules": "lora",
        "trained": 7,
        "instead": "noise",
    }
    args = SimpleNamespace(
        pretrained_model_name_or_path="a/b",
        save_as="lora",
        method="ebu_added",
        max_train_steps=2,
        output_dir=tmp_path,
    )
    header = "---\nlicense: other\nlicense_name: its-own\ntags: [x]\n---\n# base\n"
    (tmp_path / "README.md").write_text(header)
    (tmp_path / "card.md").write_text(card.write(args, tmp_path, said, "me/x"))
    from huggingface_hub import metadata_load

    found = metadata_load(tmp_path / "card.md")
    assert found.pop("tags")[-2:] == ["machine-unlearning", "lora"]
    assert found == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "a/b",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "its-own",
    }
    assert "licence (`other`) holds for this model too" in (tmp_path / "card.md").read_text()
    for broken in ("no header", "---\nlicense: [\n---\n", "---\nlicense: [a, b]\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert card.licence(tmp_path) == {}
    assert card.licence(tmp_path / "none") == {}


# -- its parts against the library's ------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(made):
    """The pipeline as diffusers loads it, and as unlearn.py has it."""
    pipe = StableDiffusionPipeline.from_pretrained(made / "base2")
    texts = ["a cat", "", "a red car"]
    table = module("prompts").encode(texts, pipe.tokenizer, pipe.text_encoder, batch=2)
    return pipe, table, module("modules").Prompted(pipe.unet, table).eval()


def test_text_embeddings_are_the_pipelines(parts):
    pipe, table, _ = parts
    expected, empty = pipe.encode_prompt("a red car", "cpu", 1, True)
    torch.testing.assert_close(table[2:], expected)
    torch.testing.assert_close(table[1:2], empty)


def test_validation_draws_what_the_pipeline_draws(made, parts):
    pipe, _, model = parts
    args = SimpleNamespace(
        num_validation_images=2,
        validation_inference_steps=3,
        validation_guidance_scale=4.0,
        seed=5,
        variant=None,
    )
    state = torch.get_rng_state()
    found = module("validation").draw(
        args, model, pipe.scheduler, [0, 2], 1, (4, 8, 8), made / "base2"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert found.shape == (4, 3, 16, 16)
    pipe.set_progress_bar_config(disable=True)
    for i, (prompt, seed) in enumerate([("a cat", 5), ("a cat", 6), ("a red car", 5)]):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        pixels = pipe(
            prompt, latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="np"
        ).images[0]
        difference = found[i].permute(1, 2, 0).numpy().astype(int) - (pixels * 255).round()
        assert np.abs(difference).max() <= 1


def test_validation_images_go_to_the_trackers(tmp_path):
    logged = []

    class Tracker:
        def __init__(self, name):
            self.name = name

        def log_images(self, values, step, **kwargs):
            logged.append((self.name, values["validation"].shape, step, kwargs))

    images = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).view(4, 3, 2, 2)
    accelerator = SimpleNamespace(trackers=[Tracker("tensorboard"), Tracker("wandb")])
    args = SimpleNamespace(output_dir=tmp_path, num_validation_images=2)
    module("validation").write(args, accelerator, images, 7)
    shape = (4, 2, 2, 3)
    assert logged == [("tensorboard", shape, 7, {"dataformats": "NHWC"}), ("wandb", shape, 7, {})]
    grid = np.asarray(Image.open(tmp_path / "validation" / "step_00000007.png"))
    assert grid.shape == (4, 4, 3)  # two prompts below one another, two images of each
    for i in range(4):
        y, x = 2 * (i // 2), 2 * (i % 2)
        assert (grid[y : y + 2, x : x + 2] == images[i].permute(1, 2, 0).numpy()).all()


def names(kind: str, unet) -> set[str]:
    module("modules").choose(unet, SimpleNamespace(method="ebu_added", train_modules=kind))
    return {n for n, p in unet.named_parameters() if p.requires_grad}


def test_train_modules_are_the_published_selections(made):
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    every = {n for n, _ in unet.named_parameters()}
    assert names("full", unet) == every
    cross = {n for n in every if ".attn2." in n}
    assert names("xattn", unet) == names("esd-x", unet) == cross
    strict = {n for n in every if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert names("esd-x-strict", unet) == strict
    assert names("selfattn", unet) == {n for n in every if ".attn1." in n}
    norms = {n for n in every if "norm" in n}
    assert names("esd-all", unet) == every - norms
    assert names("esd-u", unet) == every - norms - cross
    left = {n for n in every if n.startswith(("conv_out.", "conv_norm_out.", "time_embedding."))}
    assert len(left) == 8
    assert names("noxattn", unet) == every - cross - left
    assert "conv_in.weight" in names("noxattn", unet)
    assert names("notime", unet) == every - left


def test_an_adapter_begins_as_the_base_and_the_same_each_time(made):
    modules, found = module("modules"), []
    args = SimpleNamespace(method="spm", train_modules=None, seed=3)
    for _ in range(2):
        torch.rand(7)
        unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet").eval()
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, LENGTH, 16)
        with torch.no_grad():
            before = unet(*inputs).sample
            modules.choose(unet, args)
            assert torch.equal(unet(*inputs).sample, before)
        found.append({n: p for n, p in unet.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    down = {n: p for n, p in found[0].items() if ".lora_A." in n}
    assert all(p.shape[0] == 1 for p in down.values())
    # Kaiming-uniform with a = sqrt 5 is uniform within 1 / sqrt(fan in)
    for p in down.values():
        assert p.abs().max() <= p[0].numel() ** -0.5
    layers = {n.partition(".lora_")[0] for n in down}
    assert layers == set(
        modules.spm_layers(UNet2DConditionModel.from_pretrained(made / "base" / "unet"))
    )
    assert any("proj_in" in n for n in layers)
    assert any("ff.net" in n for n in layers)
    assert not any("resnets" in n for n in layers)


SD14 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "center_input_sample": False,
}


def test_single_layers_are_those_of_the_published_numbers():
    """LDM counts the blocks of a half through, diffusers by resolution: of SD, three by three."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SD14)
    layers = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}

    def inside(half: str, number: int, attention: str) -> set[str]:
        block = f"{half}_blocks.{number // 3}.attentions.{number % 3}.transformer_blocks.0"
        return {f"{block}.{attention}.{layer}" for layer in layers}

    # conv_in is the first of LDM's input_blocks
    assert names("selflayer", unet) == inside("down", 4 - 1, "attn1") | inside(
        "down", 7 - 1, "attn1"
    )
    assert names("xlayer", unet) == inside("up", 6, "attn2") | inside("up", 8, "attn2")


VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
}
UNET = 859_520_964  # numbers of SD 1.4's


REQUIRED = ("--pretrained_model_name_or_path", "-", "--forget", "cat", "--output_dir", "-")


@cache
def counted(*options):
    """memory.count for SD 1.4: one prompt is forgotten, the empty one is the surrogate."""
    args = parse(module("options").Unlearn, [*REQUIRED, *map(str, options)]).resolved()
    tokenizer = SimpleNamespace(model_max_length=77)
    looked = module("pipelines").Looked(Path(), SD14, VAE, 512, (4, 64, 64), None, tokenizer)
    texts = module("prompts").Prompts([""] * 54, [0], [1], [*range(2, 54)], 1, [0], {})
    return module("memory").count(args, looked, texts)


def test_the_papers_setting_fits_16_gb_and_the_full_unet_40():
    paper = counted()
    assert (paper.trained, paper.trained + paper.frozen) == (43_962_560, UNET)
    assert paper.peak + 2**30 < 16e9
    full = counted("--train_modules", "full")
    assert full.frozen == 0
    # weights, two gradients, two moments, theta0, F; Adam's step needs more than the activations
    assert sum(full.phases["unlearning"].values()) == 8 * 4 * UNET + 54 * 77 * 768 * 4
    assert full.peak + 2**30 < 40e9
    half = counted("--gradient_checkpointing", "--mixed_precision", "fp16")
    said = {
        line.split("|")[1].strip(): [float(cell) for cell in line.split("|")[2:5]]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `ebu`: ")
    }
    assert said["`ebu`: xattn"][0] == round(paper.peak / 2**30, 1)
    assert said["`ebu`: xattn"][2] == round(half.peak / 2**30, 1)
    assert said["`ebu`: full"][0] == round(full.peak / 2**30, 1)
    assert f"{half.peak / 2**30:.2f}" == "3.58"  # validation, no longer the unlearning
    less = half.phases["unlearning"]["activations"]
    assert less < paper.phases["unlearning"]["activations"] / 2
    joint = counted("--method", "joint").phases["unlearning"]
    # theta0 and F
    assert sum(paper.phases["unlearning"].values()) - sum(joint.values()) == 8 * paper.trained


def test_memory_is_counted_for_every_phase():
    paper, half = counted(), counted("--mixed_precision", "bf16")
    assert list(paper.phases) == ["sets", "unlearning", "validation"]
    assert paper.peak == max(sum(rows.values()) for rows in paper.phases.values())
    # the whole UNet samples four images with guidance, and in 16 bits where autocast would
    sets, drawn = paper.phases["sets"], paper.phases["sets"]["activations"] / 8
    assert sets["frozen weights"] == 4 * UNET == 2 * half.phases["sets"]["frozen weights"]
    one = counted("--sample_batch_size", 1, "--validation_steps", 0).phases
    assert "validation" not in one
    assert one["sets"]["activations"] == 2 * drawn
    assert counted("--guidance_scale", 1).phases["sets"]["activations"] == 4 * drawn
    # the VAE in float32, and what it has at once when it decodes 512x512 pixels
    pictures = paper.phases["validation"]
    assert pictures["VAE"] == 4 * 83_653_863
    assert 0.7 < pictures["activations"] / 2**30 < 0.8
    between = sum(pictures.values()) - pictures["VAE"] - pictures["activations"]
    step = sum(paper.phases["unlearning"].values()) - paper.phases["unlearning"]["activations"]
    assert between == step - 4 * paper.trained  # one of the two gradients is gone
    # a Fisher of four timesteps at once: two gradients and F
    sa = counted("--method", "sa").phases["Fisher"]
    assert sa["activations"] == 4 * paper.phases["unlearning"]["activations"]
    assert sum(sa.values()) - sa["activations"] == 4 * UNET + 12 * paper.trained
    assert "sets" not in counted("--method", "esd").phases
    # two adversaries: an embedding each, with its gradient and Adam's moments, and their losses
    plain, two = paper.phases["unlearning"], counted("--adversary_steps", 1, "--adversaries", 2)
    assert two.phases["unlearning"]["adversaries"] == 2 * 4 * 4 * 77 * 768
    assert two.phases["unlearning"]["activations"] == 3 * plain["activations"]
    # a relearner: the weights as they were, and a gradient
    moved = counted("--relearner_steps", 3).phases["unlearning"]
    assert sum(moved.values()) - sum(plain.values()) == 8 * paper.trained
    table = paper.table().splitlines()
    assert table[0].split() == ["GiB", "sets", "unlearning", "validation"]
    assert table[-1].split() == ["peak", f"{paper.peak / 2**30:.2f}"]


def passes_of_the_guide() -> dict[str, tuple[int, int]]:
    """A step's passes with and without a backward one, by the row of the table."""
    _, text = PAGE.read_text().split("## Time\n")
    cells = [
        line.split("|")[1:-1] for line in text.partition("\n## ")[0].splitlines() if "|" in line
    ]
    return {c[0].strip(): (int(c[1]), int(c[2])) for c in cells[2:]}


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("`ebu`, `joint`", ["--method", "ebu"]),
        ("`ebu`, `joint`", ["--method", "joint"]),
        (
            "`ebu`, `joint` with `--remember_loss crossed` or `distill`",
            ["--method", "ebu", "--remember_loss", "crossed"],
        ),
        (
            "`ebu`, `joint` with `--forget_loss relabel --remember_loss crossed`",
            [
                "--method",
                "ebu",
                "--forget_loss",
                "relabel",
                "--remember_loss",
                "crossed",
                "--surrogate_prompt",
                "dog",
                "--remember",
                "a red car",
            ],
        ),
        ("`sa`", ["--method", "sa", "--fisher", "online"]),
        (
            "the same with `--relearner_steps 3` instead",
            [
                "--method",
                "ebu",
                "--forget_loss",
                "relabel",
                "--remember_loss",
                "crossed",
                "--relearner_steps",
                3,
                "--surrogate_prompt",
                "dog",
                "--remember",
                "a red car",
            ],
        ),
        (
            "the same with `--adversary_steps 3`",
            [
                "--method",
                "ebu",
                "--forget_loss",
                "relabel",
                "--remember_loss",
                "crossed",
                "--adversary_steps",
                3,
                "--surrogate_prompt",
                "dog",
                "--remember",
                "a red car",
            ],
        ),
        ("`salun`", ["--method", "salun", "--surrogate_prompt", "dog", "--remember", "a red car"]),
        ("`esd`", ["--method", "esd"]),
        ("`spm`", ["--method", "spm"]),
    ],
)
def test_a_step_makes_the_passes_of_the_guide(row, options, made, tmp_path, monkeypatch):
    count, sampling = {True: 0, False: 0}, []
    forward = UNet2DConditionModel.forward

    def counted(self, sample, *args, **kwargs):
        if not sampling:
            count[torch.is_grad_enabled()] += len(sample)
        return forward(self, sample, *args, **kwargs)

    def denoised(*args, of, **kwargs):
        sampling.append(1)
        try:
            return of(*args, **kwargs)
        finally:
            sampling.pop()

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    for name in ("objectives", ".diffusion.objectives"):
        of = partial(denoised, of=module(name).partly_denoised)
        monkeypatch.setattr(module(name), "partly_denoised", of)
    found = []
    for i, steps in enumerate((1, 1, 3)):  # the first makes the sets
        count.update({True: 0, False: 0})
        succeed(*unlearn(made, tmp_path / str(i), *options, "--max_train_steps", steps))
        found.append(tuple(count.values()))
    _, one, three = found
    assert tuple((b - a) / 2 for a, b in zip(one, three, strict=True)) == passes_of_the_guide()[row]


def passes_counted(made: Path, size: int):
    """memory.passes of the small pipeline, of one image."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(made / "base" / "unet")
        )
    vae = AutoencoderKL.load_config(made / "base" / "vae")
    tokenizer = SimpleNamespace(model_max_length=LENGTH)
    latents = (4, size, size)
    looked = module("pipelines").Looked(Path(), {}, vae, 2 * size, latents, None, tokenizer)
    return module("memory").passes(unet, looked)


def test_counted_activations_are_those_of_a_real_pass(made):
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet").train()
    units_of = module("families").STABLE_DIFFUSION.units
    with module("memory").saved(unet, units_of) as (units, _):
        unet(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.randn(3, LENGTH, 16))
    # an attention on a CPU keeps one number a row beside
    assert 3 * passes_counted(made, 8).kept == pytest.approx(sum(units.values()), rel=0.05)


def test_what_sampling_is_counted_to_need_is_what_it_allocates(made, tmp_path):
    """By PyTorch's allocator, which knows nothing of the count."""
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    model = module("modules").Prompted(unet, torch.randn(1, LENGTH, 16))
    given = torch.randn(8, 4, 16, 16), torch.zeros(8), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        model(*given)  # the first pass makes what stays
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(*given)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    allocated = max(np.cumsum([e["args"]["Bytes"] for e in events]))
    assert 8 * passes_counted(made, 16).drawn == pytest.approx(allocated, rel=0.02)


def test_a_copy_in_16_bits_samples_what_autocast_would(made, tmp_path, monkeypatch):
    sets_of, modules, found = module("sets"), module("modules"), []
    for name in ("copy", "autocast"):

        def halve(unet, dtype, name=name):
            found.append(weakref.ref(unet))
            if name == "copy":
                modules.halve_frozen(unet, dtype)

        monkeypatch.setattr(sets_of, "halve_frozen", halve)
        args = parse(
            module("options").Unlearn,
            [
                str(a)
                for a in unlearn(
                    made,
                    tmp_path / name,
                    "--mixed_precision",
                    "bf16",
                    "--sets_dir",
                    tmp_path / name,
                )
            ],
        ).resolved()
        looked = module("pipelines").look(args)
        args = looked.family.guided(args, looked.unet)
        texts = module("prompts").collect(args, looked.tokenizer)
        unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
        table = torch.randn(
            len(texts.texts), LENGTH, 16, generator=torch.Generator().manual_seed(0)
        )
        with torch.autocast("cpu", torch.bfloat16):
            sets = sets_of.make(args, looked, made / "base", texts, unet, table, "", "cpu")
        assert {p.dtype for p in unet.parameters()} == {torch.float32}
        assert all(p.requires_grad for p in unet.parameters())
        assert found[-1]() is None  # its memory is free
        found.append(sets)
    _, ours, _, theirs = found
    for a, b in ((ours.replay, theirs.replay), (ours.surrogate, theirs.surrogate)):
        assert torch.equal(a[0], b[0])
        assert a[0].std() > 0.1


# -- bad input ----------------------------------------------------------------------------------


def refused(match: str):
    return pytest.raises(InputError, match=match)


CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_a_model_that_cannot_be_unlearned_is_told_before_anything_is_loaded(made, tmp_path):
    def broken(name: str, change) -> Path:
        shutil.copytree(made / "base", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def config(folder: Path, file: str, **values) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def unsafe(folder: Path) -> None:
        config(folder, "model_index.json", safety_checker=CHECKER)
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "pytorch_model.bin").touch()

    cases = {
        "is not a diffusers pipeline: model_index.json is missing": tmp_path,
        "is not a complete safetensors file": Path(__file__),
        "the subfolder vae is missing": broken("a", lambda f: shutil.rmtree(f / "vae")),
        "with one text encoder and a UNet": broken(
            "b", lambda f: config(f, "model_index.json", text_encoder_2=["transformers", "X"])
        ),
        "its unet is a UNet2DModel, not a UNet2DConditionModel": broken(
            "c", lambda f: config(f, "model_index.json", unet=["diffusers", "UNet2DModel"])
        ),
        "has no text_encoder": broken(
            "d", lambda f: config(f, "model_index.json", text_encoder=[None, None])
        ),
        "9 channels and the VAE makes 4": broken(
            "e", lambda f: config(f, "unet/config.json", in_channels=9)
        ),
        "prediction_type is 'sample'": broken(
            "f", lambda f: config(f, "scheduler/scheduler_config.json", prediction_type="sample")
        ),
        "has no safetensors weights; it has config.json": broken(
            "g", lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        ),
        "tokens and the text encoder": broken(
            "h", lambda f: config(f, "text_encoder/config.json", vocab_size=49408)
        ),
        "text embeddings of 32, its text encoder makes 16": broken(
            "i", lambda f: config(f, "unet/config.json", cross_attention_dim=32)
        ),
        "scheduler is incomplete": broken(
            "j", lambda f: (f / "scheduler" / "scheduler_config.json").unlink()
        ),
        # read when the result is saved, that is, after the hours
        "the subfolder safety_checker is missing": broken(
            "k", lambda f: config(f, "model_index.json", safety_checker=CHECKER)
        ),
        "safety_checker has no safetensors weights": broken("l", unsafe),
    }
    for message, folder in cases.items():
        command = unlearn(made, tmp_path / "o")
        command[1] = folder
        code, said = run(*command)
        assert code == 2, (message, said)
        assert message in said
        assert "Traceback" not in said
    assert not (tmp_path / "o").exists()


def test_mistakes_are_told_in_one_line_before_any_time_is_spent(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    out = tmp_path / "o"
    cases = {
        f"has {LENGTH + 1} tokens, begin and end included, and the tokenizer takes {LENGTH}": [
            "--remember",
            " ".join(["cat"] * (LENGTH - 1)),
        ],
        "--remember 'cat' is also a prompt to forget": ["--remember", "a dog", "cat"],
        "--remember 'CAT' is also a prompt to forget": ["--remember", "CAT"],  # CLIP lowers it
        "--surrogate_prompt 'cat' is also a prompt to forget": ["--surrogate_prompt", "cat"],
        "--surrogate_concept 'cat' is also a prompt to forget": ["--surrogate_concept", "cat"],
        "--surrogate_concept and --surrogate_prompt: give one": [
            "--surrogate_concept",
            "dog",
            "--surrogate_prompt",
            "a dog",
        ],
        "--surrogate_pairing each: --forget has 1 and --surrogate_concept 2; give one for each": [
            "--surrogate_pairing",
            "each",
            "--surrogate_concept",
            "dog",
            "dog",
        ],
        "the empty prompt is the unconditional model": ["--forget", ""],
        "needs exactly one": ["--forget_templates", "a photo"],
        "empty.txt has no prompt": ["--remember", tmp_path / "empty.txt"],
        "none.txt cannot be read": ["--forget", tmp_path / "none.txt"],
        "attn9: the denoiser has no such Linear or Conv2d layer; their names end in": [
            "--train_modules",
            "lora",
            "--lora_target_modules",
            "to_k",
            "attn9",
        ],
        "--train_modules xlayer selects no parameter of this UNet": ["--train_modules", "xlayer"],
        "is in use by something else": ["--output_dir", tmp_path / "mine"],
        "--resolution must be a multiple of 4": ["--resolution", 18],
        "--variant fp16; it has": ["--variant", "fp16"],
        "SPM trains its own adapters": ["--method", "spm", "--train_modules", "full"],
        "--save_as lora: --train_modules xattn": ["--save_as", "lora"],
        "--surrogate folder and --surrogate_dir go together": ["--surrogate", "folder"],
        "no image (": ["--surrogate", "folder", "--surrogate_dir", tmp_path / "mine"],
        "--fisher_timesteps must be even": ["--fisher_timesteps", 3],
        "--forget_loss: esd has its own forget loss": [
            "--method",
            "esd",
            "--forget_loss",
            "relabel",
        ],
        "--method salun: remember_weight": [
            "--method",
            "salun",
            "--method_options",
            '{"remember_weight": -1}',
        ],
        "--method joint has no option alpha": ["--method", "joint", "--alpha", 0.5],
        "--alpha must be in [0, 1]; got 2.0": ["--alpha", 2],
        "--guided_steps must be >= 2": ["--guided_steps", 1],
        "--mixed_precision fp16 needs a GPU": ["--mixed_precision", "fp16", "--cpu"],
        # with Stable Diffusion's steps_offset DDIM's 1000 steps begin at t = 1000
        "--num_inference_steps must be <= 999, the model's; got 1000": [
            "--num_inference_steps",
            1000,
        ],
        "--guided_steps must be <= 999": ["--method", "esd", "--guided_steps", 1001],
        "--validation_inference_steps must be <= 999": ["--validation_inference_steps", 1000],
        "--guidance_scale: Expected float. Got value: nan": ["--guidance_scale", "nan"],
        "--guided_scale: Expected float. Got value: inf": ["--guided_scale", "inf"],
        "--validation_guidance_scale must be finite": ["--validation_guidance_scale", -1],
        "--lora_alpha must be finite, > 0": ["--train_modules", "lora", "--lora_alpha", 0],
        "--condition_noise must be finite, >= 0; got -1.0": ["--condition_noise", -1],
        "--condition_noise: not possible with --method esd": [
            "--method",
            "esd",
            "--condition_noise",
            1,
        ],
        "--adversary_steps must be >= 0; got -1": ["--adversary_steps", -1],
        "--adversaries must be >= 1; got 0": ["--adversary_steps", 1, "--adversaries", 0],
        "--adversary_restart must be >= 1": ["--adversary_steps", 1, "--adversary_restart", 0],
        "--adversary_learning_rate must be > 0 and finite; got 0.0": [
            "--adversary_steps",
            1,
            "--adversary_learning_rate",
            0,
        ],
        "--adversary_weight must be > 0 and finite; got 0.0": [
            "--adversary_steps",
            1,
            "--adversary_weight",
            0,
        ],
        "--adversaries needs --adversary_steps, of which there are none": ["--adversaries", 2],
        "--adversary_prompts needs --adversary_steps": ["--adversary_prompts", "a cat"],
        f"--adversary_prompts: the prompt {' '.join(['cat'] * LENGTH)!r}... has": [
            "--adversary_steps",
            1,
            "--adversary_prompts",
            " ".join(["cat"] * LENGTH),
        ],
        "--adversary_steps: --method fine_tune has no forget loss": [
            "--method",
            "fine_tune",
            "--adversary_steps",
            1,
        ],
        "--relearner_steps must be >= 0; got -1": ["--relearner_steps", -1],
        "--relearner_learning_rate must be > 0 and finite; got 0.0": [
            "--relearner_steps",
            1,
            "--relearner_learning_rate",
            0,
        ],
        "--relearner_weight must be > 0 and finite; got -1.0": [
            "--relearner_steps",
            1,
            "--relearner_weight",
            -1,
        ],
        "--relearner_weight needs --relearner_steps, of which there are none": [
            "--relearner_weight",
            2,
        ],
        "--relearner_learning_rate needs --relearner_steps": ["--relearner_learning_rate", 1],
        "--relearner_steps: --method fine_tune has no forget loss": [
            "--method",
            "fine_tune",
            "--relearner_steps",
            1,
        ],
        "--warm_start uce: --train_modules selfattn does not train all": [
            "--warm_start",
            "uce",
            "--train_modules",
            "selfattn",
        ],
        "--warm_start uce: not possible with --method rece, RECE, because it is the same": [
            "--method",
            "rece",
            "--warm_start",
            "uce",
        ],
        "--train_modules lora: not possible with --method uce, UCE, because it edits": [
            "--method",
            "uce",
            "--train_modules",
            "lora",
        ],
        "--quantize int8: not possible with --method uce": [
            "--method",
            "uce",
            "--quantize",
            "int8",
        ],
        "--forget_loss relabel: not possible with --method uce, UCE, because it has no loss": [
            "--method",
            "uce",
            "--forget_loss",
            "relabel",
        ],
        "--adversary_steps 1: not possible with --method speed": [
            "--method",
            "speed",
            "--adversary_steps",
            1,
        ],
        "--relearner_steps 1: not possible with --method speed": [
            "--method",
            "speed",
            "--relearner_steps",
            1,
        ],
        "--save_as lora: UCE has no adapters": ["--method", "uce", "--save_as", "lora"],
        "UCE takes no step and has no checkpoints; give latest": [
            "--method",
            "uce",
            "--resume_from_checkpoint",
            tmp_path / "step_7",
        ],
        "--method uce: ridge must be finite and > 0; got -1": [
            "--method",
            "uce",
            "--method_options",
            '{"ridge": -1}',
        ],
        "--method uce has no option rounds to set": [
            "--method",
            "uce",
            "--method_options",
            '{"rounds": 2}',
        ],
        "--warm_start rece: spm does not train all": ["--warm_start", "rece", "--method", "spm"],
        "--hub_model_id needs --push_to_hub": ["--hub_model_id", "me/model"],
        "there is no such folder": ["--resume_from_checkpoint", tmp_path / "step_7"],
    }
    for message, wrong in cases.items():
        code, said = run(*unlearn(made, out, *wrong))
        assert code == 2, (message, said)
        assert message in said, said
        assert "Traceback" not in said
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_modules_that_select_nothing(made):
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    for _, child in list(unet.named_children()):
        for name, block in list(child.named_modules()):
            if name.endswith("attn1"):
                parent = child.get_submodule(name.rpartition(".")[0])
                parent.attn1 = torch.nn.Identity()
            del block
    with refused("--train_modules selfattn selects no parameter of this UNet"):
        module("modules").choose(
            unet, SimpleNamespace(method="ebu_added", train_modules="selfattn")
        )
    assert all(p.requires_grad for p in unet.parameters())
    with refused("no Transformer2DModel"):
        module("modules").spm_layers(torch.nn.Linear(2, 2))


def test_spm_samples_in_eval_mode(made, tmp_path, monkeypatch):
    losses, modes = module("objectives"), []

    def denoised(model, *args, of=losses.partly_denoised, **kwargs):
        modes.append(model.training)
        return of(model, *args, **kwargs)

    monkeypatch.setattr(losses, "partly_denoised", denoised)
    succeed(*unlearn(made, tmp_path / "o", "--method", "spm", "--max_train_steps", 1))
    assert modes == [False]


def test_noise_is_on_the_forgotten_condition_and_not_on_what_it_is_compared_with(
    made, tmp_path, monkeypatch
):
    losses, seen = module(".diffusion.objectives"), []

    def relabelled(model, x, labels, other, *args, **kwargs):
        clean = model.class_embedding.weight
        seen.extend((model.class_embedding(c) != clean[c]).any(1).tolist() for c in (labels, other))
        return losses_of(model, x, labels, other, *args, **kwargs)

    losses_of = losses.relabel_loss
    monkeypatch.setattr(losses, "relabel_loss", relabelled)
    succeed(
        *unlearn(
            made,
            tmp_path / "o",
            "--method",
            "salun",
            "--surrogate_prompt",
            "dog",
            "--condition_noise",
            1,
            "--max_train_steps",
            1,
        )
    )
    assert seen == [[True], [False]]


def test_adversaries_begin_at_given_prompts(made, tmp_path, monkeypatch):
    seen = []
    step = Adversary.step

    def noted(self, attack):
        step(self, attack)
        seen.append((self.vectors[0].detach(), self.embedding.weight, self.start))

    monkeypatch.setattr(Adversary, "step", noted)
    succeed(
        *unlearn(
            made,
            tmp_path / "o",
            "--adversary_steps",
            1,
            "--adversary_prompts",
            "a photo of a cat",
            "--adversary_learning_rate",
            1e-6,
        )
    )
    texts = ["cat", "", "a dog", "a red car", "a photo of a cat"]  # shown ones are among them
    vector, table, start = seen[0]
    assert len(table) == len(texts)
    torch.testing.assert_close(vector, table[-1], rtol=0, atol=1e-4)
    assert torch.equal(start, table[-1:])
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["uce", "rece"])
def test_a_warm_start_begins_at_the_edit_in_closed_form(kind, made, tmp_path):
    still = ["--warm_start", kind, "--learning_rate", 1e-12, "--surrogate_prompt", "dog"]
    still += ["--remember", "a red car", ""]
    succeed(*unlearn(made, tmp_path / "o", *still))
    pipe = StableDiffusionPipeline.from_pretrained(made / "base")
    texts = ["cat", "dog", "a red car", ""]
    given = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        hidden = pipe.text_encoder(given.input_ids)[0]
    ends = [max(len(pipe.tokenizer(t).input_ids) - 2, 0) for t in texts]
    cat, dog, car, empty = hidden[range(4), ends].split(1)
    keep, read = torch.cat([car, empty]), ("attn2.to_k.weight", "attn2.to_v.weight")
    base, found = weights(made / "base"), weights(tmp_path / "o" / "pipeline")
    edit = uce(cat, dog, keep)
    if kind == "rece":
        sums = gram(w for n, w in base.items() if n.endswith(read))
        edit = rece(sums, hidden[0], hidden[1], keep, start=edit)
    for name, w in base.items():
        led = (w.double() @ edit).float() if name.endswith(read) else w
        torch.testing.assert_close(found[name], led, rtol=1e-4, atol=1e-5)
    assert any((found[n] - w).abs().max() > 1e-3 for n, w in base.items() if n.endswith(read))


def read_as(pipe, texts):
    """The last tokens of prompts (the beginning of the empty one), and all tokens."""
    given = pipe.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        hidden = pipe.text_encoder(given.input_ids)[0].double()
    ends = [max(len(pipe.tokenizer(t).input_ids) - 2, 0) for t in texts]
    return hidden[range(len(texts)), ends], hidden


CLOSED = ["--surrogate_prompt", "dog", "--remember", "a red car", "a person", ""]


@pytest.mark.parametrize("method", ["uce", "rece", "speed"])
def test_an_edit_in_closed_form_is_a_method_of_its_own(method, made, tmp_path):
    own = ["--sets_dir", tmp_path / "o" / "sets"]
    said = succeed(*unlearn(made, tmp_path / "o", "--method", method, *CLOSED, *own))
    assert "sets in" not in said
    assert not list((tmp_path / "o").glob("**/checkpoints"))
    kept = [f.name.partition("-")[0] for f in (tmp_path / "o" / "sets").iterdir()]
    assert kept == ["text"]
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "o" / "pipeline")
    (cat, dog, *keep), hidden = read_as(pipe, ["cat", "dog", "a red car", "a person", ""])
    keep, pair = torch.stack(keep), (cat[None], dog[None])
    base, found = weights(made / "base"), weights(tmp_path / "o" / "pipeline")
    ends = tuple(f"{end}.weight" for end in closed_forms[method].edits)
    edited = {n: w.double() for n, w in base.items() if n.endswith(ends)}
    edit = uce(*pair, keep)
    if method == "rece":
        edit = rece(gram(edited.values()), hidden[0], hidden[1], keep, start=edit)
    for name, w in edited.items():
        new = found[name].double()
        if method == "speed":
            chosen = influential(w, *pair, keep)
            assert 0 < len(chosen) < len(keep)
            edit = speed(*pair, chosen, invariants(hidden[-1]))
            torch.testing.assert_close(new @ chosen.T, w @ chosen.T, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(new @ hidden[-1][0], w @ hidden[-1][0], rtol=1e-4, atol=1e-4)
        # the concept is read as what takes its place, up to the ridge
        before, after = ((m @ cat - w @ dog).norm() for m in (w, new))
        if method != "rece":  # its rounds edit further embeddings, which move this one again
            assert after < 0.5 * before
        torch.testing.assert_close(new, w @ edit, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found[n], w) for n, w in base.items() if n not in edited)
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["remember"] == ["a red car", "a person", ""]
    assert (
        report["settings"].items()
        >= {"speed": {"threshold": 0.1}, "uce": {"ridge": 0.5}}.get(method, {"rounds": 3}).items()
    )
    assert report["options"]["max_train_steps"] == "0"
    assert report["memory_counted"].keys() == {"peak", "prompts"}


def test_an_edit_in_closed_form_is_the_same_in_every_form_and_with_its_options(made, tmp_path):
    more = ["--method", "uce", *CLOSED, "--method_options", '{"ridge": 0.01}']
    for form in ("pipeline", "changed", "single"):
        succeed(*unlearn(made, tmp_path / form, *more, "--save_as", form))
    again = unlearn(made, tmp_path / "changed", *more, "--save_as", "changed")
    succeed(*again, "--resume_from_checkpoint", "latest")
    whole = weights(tmp_path / "pipeline" / "pipeline")
    part = load_file(tmp_path / "changed" / "changed" / "unet_changed.safetensors")
    assert part.keys() == {
        n for n in whole if n.endswith(("attn2.to_k.weight", "to_v.weight")) and "attn2" in n
    }
    assert all(torch.equal(t, whole[n]) for n, t in part.items())
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "single" / "single" / "single.safetensors", config=str(made / "base")
    )
    assert all(torch.equal(t, whole[n]) for n, t in pipe.unet.state_dict().items())
    base = weights(made / "base")
    (cat, dog), _ = read_as(StableDiffusionPipeline.from_pretrained(made / "base"), ["cat", "dog"])
    for name, w in part.items():
        new, old = w.double(), base[name].double()
        assert (new @ cat - old @ dog).norm() < 0.1 * (old @ cat - old @ dog).norm()


def test_speed_without_a_null_space_names_options(made):
    """Of random embeddings, as those of the small text encoder never fill their last direction."""
    unet = UNet2DConditionModel.from_pretrained(made / "base" / "unet")
    before = {n: w.clone() for n, w in unet.state_dict().items()}
    texts = ["cat", "dog", "", *(f"a {'red ' * i}car" for i in range(5))] + ["a car"] * 55
    g = torch.Generator().manual_seed(0)
    table = Conditions.of(torch.randn(len(texts), LENGTH, 16, generator=g))
    prompts = Prompts(texts, [0], [1], [*range(3, len(texts))], 2, [0], {0: [1]})
    words = StableDiffusionPipeline.from_pretrained(made / "base").tokenizer
    with refused(
        r"--method speed: threshold=0.1: in all 16 .* Give fewer prompts to keep, or a "
        r"larger threshold, e.g. --method_options '{\"threshold\": 1}'"
    ):
        module("edits").edit("speed", unet, table, prompts, words)
    assert all(torch.equal(w, before[n]) for n, w in unet.state_dict().items())
    module("edits").edit("speed", unet, table, prompts, words, {"threshold": 1})
    assert any(not torch.equal(w, before[n]) for n, w in unet.state_dict().items())


def test_a_warm_started_run_is_resumed_bit_for_bit(made, tmp_path):
    more = ["--warm_start", "uce", "--remember_loss", "crossed", "--checkpointing_steps", 1]
    more += ["--max_train_steps"]
    succeed(*unlearn(made, tmp_path / "whole", *more, 3))
    succeed(*unlearn(made, tmp_path / "parts", *more, 1))
    succeed(*unlearn(made, tmp_path / "parts", *more, 3, "--resume_from_checkpoint", "latest"))
    a, b = (weights(tmp_path / name / "pipeline") for name in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@NAMES
def test_a_rule_that_works_module_by_module_is_resumed_bit_for_bit(made, tmp_path):
    more = ["--method", "pcgrad", "--method_options", '{"scope": "module"}']
    more += ["--checkpointing_steps", 1, "--max_train_steps"]
    succeed(*unlearn(made, tmp_path / "whole", *more, 3))
    succeed(*unlearn(made, tmp_path / "parts", *more, 1))
    succeed(*unlearn(made, tmp_path / "parts", *more, 3, "--resume_from_checkpoint", "latest"))
    a, b = (weights(tmp_path / name / "pipeline") for name in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_another_base_model_is_not_resumed(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    command = unlearn(tmp_path, tmp_path / "o")
    succeed(*command)
    fewer = ("--resume_from_checkpoint", "latest", "--max_train_steps", 1)
    code, said = run(*command, *fewer)
    assert code == 2
    assert "--max_train_steps 1: the checkpoint is of step 2" in said
    other = [made / "base" if part == tmp_path / "base" else part for part in command]
    code, said = run(*other, "--resume_from_checkpoint", "latest")
    assert code == 2
    assert f"has pretrained_model_name_or_path {tmp_path / 'base'}, this one {made}" in said
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import save_file

    save_file({n: t * 1.01 for n, t in load_file(file).items()}, file)
    code, said = run(*command, "--resume_from_checkpoint", "latest")
    assert code == 2
    assert "was begun with another unet (unet: " in said


def test_a_full_gpu_is_told_with_what_takes_less(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/unlearn.py"])

    def full():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nFrames")

    with pytest.raises(SystemExit) as end:
        module(".training").command(lambda _: full(), module("options").Unlearn, None, REQUIRED)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("unlearn.py: error: CUDA out of memory. Tried to allocate 2 GiB.\nA ")
    assert "smaller batch needs less" in said
    assert "--resume_from_checkpoint latest continues" in said
    assert "Frames" not in said


def test_prompts_that_mention_what_is_forgotten_are_told(made, tmp_path):
    (tmp_path / "some.txt").write_text('a photo of a CAT, in a car\n\n""\n')
    said = succeed(
        *unlearn(made, tmp_path / "o", "--remember", tmp_path / "some.txt", "--max_train_steps", 1)
    )
    assert "1 of the prompts to remember mention a concept to forget" in said
    report = json.loads((tmp_path / "o" / "unlearn.json").read_text())
    assert report["remember"] == ["a photo of a CAT, in a car", ""]


def test_options_without_effect_and_prompts_without_images_are_told(made, tmp_path):
    said = succeed(
        *unlearn(
            made,
            tmp_path / "a",
            "--method",
            "esd",
            "--surrogate",
            "gaussian",
            "--fisher",
            "estimate",
            "--esd_eta",
            1,
            "--surrogate_concept",
            "dog",
            "--max_train_steps",
            1,
        )
    )
    assert (
        "without effect on this run: --surrogate, --surrogate_concept, --remember, --fisher\n"
        in said
    )
    assert "remembers nothing" in said
    said = succeed(*unlearn(made, tmp_path / "b", "--replay_images", 2, "--max_train_steps", 1))
    assert "--replay_images 2: only as many of the 3 prompts are replayed" in said
    assert "without effect" not in said


def test_the_shipped_prompts_are_many_and_short_enough():
    prompts = module("prompts")
    texts = prompts.read([str(prompts.REMEMBER)], "--remember")
    assert len(texts) >= 40
    assert texts[0] == ""
    assert max(len(t.split()) for t in texts) < 20


def hub_error(name: str):
    import huggingface_hub.errors as errors

    # what the hub's client is made of differs between its versions
    response = SimpleNamespace(headers={}, request=None, status_code=401)
    return getattr(errors, name)(name, response=response)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (
            "GatedRepoError",
            "is gated: accept its licence on https://huggingface.co/a/b, then log in",
        ),
        ("RepositoryNotFoundError", "neither a folder here nor a public model on the hub"),
        ("RevisionNotFoundError", "has no --revision main2"),
        (None, "the download from the hub failed .*Without a network give a folder"),
    ],
)
def test_the_hubs_errors_say_what_to_do(error, match, monkeypatch):
    import huggingface_hub

    args = module("pipelines").Model(pretrained_model_name_or_path="a/b", revision="main2")
    if error is None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:

        def fails(*_: object, **__: object):
            raise hub_error(error)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with refused(match):
        module("pipelines").look(args)


def test_a_scheduler_of_the_pipeline_and_ours_have_the_same_noise(made):
    """PNDM, DDIM and DDPM of one configuration share alphas_cumprod."""
    model = module("pipelines").Model(pretrained_model_name_or_path=str(made / "base"))
    looked = module("pipelines").look(model)
    theirs = DDIMScheduler.from_pretrained(made / "base", subfolder="scheduler")
    assert torch.equal(looked.scheduler.alphas_cumprod, theirs.alphas_cumprod)
    assert looked.latents == (4, 8, 8)
    assert looked.resolution == 16


def test_the_guide_names_real_options():
    files = [*SCRIPTS.rglob("*.py"), ROOT / "ebu_optim" / "diffusion" / "objectives.py"]
    for room in ("text_to_image", "attacks", "worlds", "training", "experiments"):
        files += (ROOT / "ebu_optim" / room).rglob("*.py")
    code = "\n".join(f.read_text() for f in files)
    known = set(re.findall(r'"--([a-z_]+)"', code))
    known |= set(re.findall(r"^    ([a-z_]+): .+ = option\(", code, re.MULTILINE))
    named = set(re.findall(r"--([a-z_]+)", PAGE.read_text()))
    assert len(named) > 25
    assert named - known == set()
