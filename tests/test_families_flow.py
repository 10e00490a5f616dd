"""Families of flow matching in small: what they compute is what diffusers computes, runs of
forgetting go through, and a model that is trained on these losses draws what it is asked for."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5", reason="the tiny tokenizer of T5 is made as of 5")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

import diffusers
from safetensors.torch import load_file

from ebu_optim import diffusion as D
from ebu_optim.errors import InputError
from ebu_optim.training.options import parse

from .scripts import reset_accelerate
from .text_to_image import LENGTH, sd3

GONE = {"text_encoder_3": None, "tokenizer_3": None}
NAMES = ("sd3", "sd3_without_t5")


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.text_to_image")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("flow")
    for name in NAMES:
        sd3(out / name, with_t5=name == "sd3")
    # a latent's 16 channels fit through a width of 32, a patch of four of them would not
    sd3(out / "fine", patch_size=1)
    return out


def opened(folder: Path):
    """As diffusers opens it, which wants to be told of T5 that is not there."""
    there = {} if (folder / "text_encoder_3").is_dir() else GONE
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **there)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def look(folder: Path):
    p = module("pipelines")
    return p.look(p.Model(pretrained_model_name_or_path=str(folder)))


def options(made: Path, name: str, out: Path, *more):
    given = [
        "--pretrained_model_name_or_path", made / name, "--forget", "cat", "--sets_dir",
        made / f"sets_{name}", "--max_train_steps", 2, "--replay_images", 2, "--surrogate_images",
        2, "--forget_images", 2, "--num_inference_steps", 2, "--guided_steps", 3,
        "--learning_rate", 1e-3, "--remember", "a dog", "a red car", "--validation_steps", 0,
        "--fisher_images", 2, "--fisher_timesteps", 2, "--output_dir", out, "--cpu", *more,
    ]  # fmt: skip
    return parse(module("options").Unlearn, [str(a) for a in given])


def unlearn(made: Path, name: str, out: Path, *more) -> Path:
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()):
        module("unlearn").unlearn(options(made, name, out, *more))
    return out


def prompted(made: Path, name: str, texts: list[str], tmp_path: Path):
    """Looked, and the `Prompted` that a run would train."""
    args, looked = options(made, name, tmp_path).resolved(), look(made / name)
    told = module("sets").conditions(args, looked, made / name, texts, "cpu")
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(made / name / "transformer")
    return looked, module("modules").Prompted(transformer, told, looked.family).eval()


# -- what is computed is what the pipeline computes ---------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_prediction_with_guidance_is_the_pipelines(name, made, tmp_path):
    looked, model = prompted(made, name, ["a cat", "", "a red car"], tmp_path)
    assert looked.latents == (16, 8, 8)
    assert len(looked.family.encoders) == (3 if name == "sd3" else 2)
    pipe, said = opened(made / name), []
    pipe.transformer.register_forward_hook(lambda _m, _i, out: said.append(out[0]))
    noise = torch.randn(1, *looked.latents, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        drawn = pipe(
            "a red car", latents=noise, num_inference_steps=3, guidance_scale=5.0, output_type="pt"
        ).images
    t = pipe.scheduler.timesteps[0]
    assert float(t) == 1000
    with torch.no_grad():
        ours = model(noise.expand(2, -1, -1, -1), t.expand(2), torch.tensor([1, 2]))
    torch.testing.assert_close(ours, said[0])
    assert (ours[0] - ours[1]).abs().max() > 1e-4
    args = options(
        made, name, tmp_path, "--num_validation_images", 1, "--validation_inference_steps", 3,
        "--validation_guidance_scale", 5, "--seed", 3,
    ).resolved()  # fmt: skip
    found = module("validation").draw(
        args, model, looked.scheduler, [2], 1, looked.latents, made / name
    )
    assert (found.float() - drawn * 255).abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_conditions_are_the_pipelines(name, made, tmp_path):
    args, texts = options(made, name, tmp_path).resolved(), ["", "a dog"]
    looked = look(made / name)
    found = module("sets").conditions(args, looked, made / name, texts, "cpu").each
    pipe = opened(made / name)
    with torch.no_grad():
        text, null, pooled, pooled_null = pipe.encode_prompt("a dog", None, None)
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([null, text]))
    torch.testing.assert_close(found["pooled_projections"], torch.cat([pooled_null, pooled]))
    shapes = looked.family.shapes(looked.unet, LENGTH)
    assert {n: tuple(t.shape[1:]) for n, t in found.items()} == shapes
    assert bool(text[:, LENGTH:].abs().max()) == (name == "sd3")


def test_latents_are_shifted_and_scaled_as_the_pipeline_has_them(made):
    looked = look(made / "sd3")
    vae = diffusers.AutoencoderKL.from_pretrained(made / "sd3" / "vae")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = looked.family.to_latents(vae, pixels)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(x, (mode - 0.0609) * 1.5305, rtol=1e-4, atol=1e-5)
        back = vae.decode(mode).sample
    torch.testing.assert_close(looked.family.to_pixels(vae, x), back, rtol=1e-4, atol=1e-5)


def test_sigmas_are_learned_at_as_sd3_does_and_any_number_of_steps_draws(made, tmp_path):
    looked = look(made / "sd3")
    assert looked.scheduler.config.weighting_scheme == "logit_normal"
    assert "weighting_scheme" not in looked.family.sampler(looked.scheduler).config
    args = options(made, "sd3", tmp_path, "--num_inference_steps", 1500).resolved()
    looked.family.check_steps(args, looked.scheduler, "num_inference_steps")


def test_memory_is_counted_by_the_transformers_blocks(made, tmp_path):
    looked, model = prompted(made, "sd3", ["a cat"], tmp_path)
    memory, number = module("memory"), torch.zeros(1, dtype=torch.long)
    with memory.saved(model.denoiser, looked.family.units) as (units, inputs):
        model(torch.zeros(1, *looked.latents), torch.tensor([500.0]), number)
    picture, text, time = 16 * 32, (LENGTH + 256) * 32, 32
    assert set(inputs) == {"transformer_blocks.0", "transformer_blocks.1"} < set(units)
    assert set(inputs.values()) == {4 * (picture + text + time)}
    with torch.device("meta"):
        empty = diffusers.SD3Transformer2DModel.from_config(looked.unet)
    one = memory.passes(empty, looked)
    assert one.kept_checkpointed < one.kept
    assert one.prompt == 4 * ((LENGTH + 256) * 64 + 64)


# -- the conventions of sign and time -----------------------------------------------------------


def test_a_model_trained_on_two_colours_draws_what_it_is_asked_for(made, tmp_path):
    """Were the sign of the velocity, the time or the latents' scale another in the losses than in
    the pipeline, this would draw something else."""
    texts, colours = ["a red car", "a blue car"], torch.tensor([[0.8, -0.6], [-0.5, 0.9]])
    looked, model = prompted(made, "fine", texts, tmp_path)
    images = torch.zeros(2, *looked.latents)
    images[:, :8], images[:, 8:] = (colours[:, i].view(2, 1, 1, 1) for i in (0, 1))
    opt = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-2)
    fall = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.02, total_iters=200)
    g, labels = torch.Generator().manual_seed(0), torch.arange(2).repeat(2)
    for _ in range(200):
        loss = D.denoising_loss(
            model, images[labels], labels, looked.scheduler, reduction="mean", generator=g
        )
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        fall.step()
    pipe = opened(made / "fine")
    pipe.transformer.load_state_dict(model.denoiser.state_dict())
    for text, image in zip(texts, images):
        with torch.no_grad():
            found = pipe(
                text, num_inference_steps=12, guidance_scale=1.0, output_type="latent",
                generator=torch.Generator().manual_seed(1),
            ).images[0]  # fmt: skip
        assert (found - image).abs().mean() < 0.15
    x = D.sample(
        model, looked.family.sampler(looked.scheduler), torch.arange(2), looked.latents,
        num_inference_steps=12, clip=False, generator=g,
    )  # fmt: skip
    assert (x - images).abs().mean() < 0.15


# -- runs ---------------------------------------------------------------------------------------

METHODS = {
    "ebu": ("--condition_noise", 1),
    "joint": ("--surrogate", "pixels", "--mixed_precision", "bf16", "--gradient_checkpointing"),
    "sa": ("--train_modules", "attention", "--surrogate", "analytic"),
    "salun": ("--train_modules", "full", "--surrogate_prompt", "dog", "--remember", "a red car"),
    "esd": ("--train_modules", "context", "--remember_loss", "replay"),
}  # fmt: skip
TRAINED = {
    "ebu": ("attn.add_k_proj", "attn.add_v_proj"), "joint": ("attn.add_k_proj", "attn.add_v_proj"),
    "sa": (".attn.",), "salun": ("",), "esd": ("context_embedder",),
}  # fmt: skip
FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "method"), [*(("sd3", m) for m in METHODS), ("sd3_without_t5", "ebu")]
)
def test_every_method_trains(name, method, made, tmp_path):
    out = unlearn(made, name, tmp_path / "o", "--method", method, *METHODS[method])
    report = json.loads((out / "unlearn.json").read_text())
    assert report["pipeline"] == "StableDiffusion3Pipeline"
    assert report["memory_counted"]["prompts"]["text encoders"] > 0
    a, b = (load_file(f / "transformer" / FILE) for f in (made / name, out / "pipeline"))
    moved = {n for n in a if not torch.equal(a[n], b[n])}
    assert moved
    assert all(any(part in n for part in TRAINED[method]) for n in moved)
    assert all(t.isfinite().all() for t in b.values())


def drawn(pipe, prompt: str = "a cat"):
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt, num_inference_steps=2, generator=g, output_type="pt").images


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_draws_the_same_by_every_way(name, made, tmp_path):
    r, p = module("results"), module("pipelines")
    lora = ["--train_modules", "lora", "--learning_rate", 1e-1]
    pictures = {}
    for way in ("pipeline", "changed", "lora"):
        out = unlearn(made, name, tmp_path / way, *lora, "--save_as", way) / way
        pictures[way] = drawn(r.load(p.Model(pretrained_model_name_or_path=str(out))))
        if way == "pipeline":
            assert torch.equal(pictures[way], drawn(opened(out)))
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        space: dict = {}
        exec(code.replace("<this repository or folder>", str(out)), space)  # noqa: S102 - the card's
        torch.testing.assert_close(drawn(space["pipe"]), pictures[way], atol=1e-4, rtol=0)
    base = drawn(opened(made / name))
    for picture in pictures.values():
        assert (picture - base).abs().max() > 1e-3
        assert torch.equal(picture, pictures["pipeline"])


def test_a_run_goes_on_bit_for_bit(made, tmp_path):
    more = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--train_modules", "attention"]
    whole = unlearn(made, "sd3", tmp_path / "whole", *more)
    part = unlearn(made, "sd3", tmp_path / "part", *more)
    shutil.rmtree(part / "pipeline")
    (last,) = (part / "checkpoints").glob("*4")
    shutil.rmtree(last)
    unlearn(made, "sd3", part, *more, "--resume_from_checkpoint", "latest")
    a, b = (load_file(f / "pipeline" / "transformer" / FILE) for f in (whole, part))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_evaluation_draws(made, tmp_path):
    from ebu_optim.text_to_image.evaluation import evaluate
    from ebu_optim.text_to_image.evaluation_options import Evaluation

    argv = [
        "--pretrained_model_name_or_path", made / "sd3", "--prompts", "a cat", "a dog",
        "--images_per_prompt", 2, "--num_inference_steps", 2, "--metrics", "--output_dir",
        tmp_path / "o",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(parse(Evaluation, [str(a) for a in argv]))
    pixels = [p.read_bytes() for p in sorted((tmp_path / "o" / "images").iterdir())]
    assert len(set(pixels)) == 4


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "why"),
    [(("--method", "spm"), "--method spm: not with Stable Diffusion 3 and 3.5: its adapters"),
     (("--train_modules", "lora", "--save_as", "kohya"), "--save_as kohya: not with"),
     (("--save_as", "single"), "--save_as single: not with"),
     (("--train_modules", "esd-u"), "--train_modules esd-u: .* there is xattn, attention, context"),
     (("--resolution", 194), "must be a multiple of 4"), (("--resolution", 196), "must be <= 96")],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_with_the_reason(given, why, made, tmp_path):
    with pytest.raises(InputError, match=why):
        unlearn(made, "sd3", tmp_path / "o", *given)
    assert not (tmp_path / "o").exists()


def edited(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


WRONG = {
    "its scheduler is a DDIMScheduler": {
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"}},
    "with invert_sigmas": {"scheduler/scheduler_config.json": {"invert_sigmas": True}},
    "use_dynamic_shifting": {"scheduler/scheduler_config.json": {"use_dynamic_shifting": True}},
    "takes 32 channels": {"transformer/config.json": {"in_channels": 32}},
    "pooled ones of 32": {"transformer/config.json": {"pooled_projection_dim": 32}},
    "make 32 and 64": {"text_encoder_3/config.json": {"d_model": 32}},
    "other vocabularies or lengths": {"tokenizer_2/tokenizer_config.json": {"model_max_length": 7}},
    "has no text_encoder_2": {"model_index.json": {"text_encoder_2": [None, None]}},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit_are_told(message, made, tmp_path):
    shutil.copytree(made / "sd3", tmp_path / "wrong")
    for file, values in WRONG[message].items():
        edited(tmp_path / "wrong", file, **values)
    with pytest.raises(InputError, match=message):
        look(tmp_path / "wrong")


def test_a_new_word_cannot_be_learned(made):
    assert "T5" in look(made / "sd3").family.no_new_word
