"""The parts of unlearn.py against those of the library."""

from __future__ import annotations

import json
import weakref
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
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch.profiler import ProfilerActivity

from ebu_optim.training.command_line import parse

from ..text_to_image import LENGTH
from .script import (
    PAGE,
    REQUIRED,
    module,
    names,
    succeed,
    unlearn,
)


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
