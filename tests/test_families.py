"""Families of text-to-image pipelines, each in small: what they compute is what diffusers computes,
and a run, a picture, an attack goes through the adapter."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

import diffusers
from safetensors.torch import load_file

from ebu_optim.errors import InputError
from ebu_optim.training.command_line import parse

from .scripts import reset_accelerate
from .text_to_image import LENGTH, few, pipeline, sdxl

PIPELINES = {
    "sd": (pipeline, {}, "StableDiffusionPipeline"),
    "sd_inpainting": (pipeline, {"inpainting": True}, "StableDiffusionInpaintPipeline"),
    "sdxl": (sdxl, {}, "StableDiffusionXLPipeline"),
    "sdxl_inpainting": (sdxl, {"inpainting": True}, "StableDiffusionXLInpaintPipeline"),
}
NAMES = tuple(PIPELINES)


def module(name: str):
    return importlib.import_module(f".{name}", "ebu_optim.text_to_image")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("families")
    for name, (build, how, _) in PIPELINES.items():
        build(out / name, **how)
    return out


def look(folder: Path):
    p = module("pipelines")
    return p.look(p.Model(pretrained_model_name_or_path=str(folder)))


def options(made: Path, name: str, out: Path, *more):
    given = [
        "--pretrained_model_name_or_path",
        made / name,
        "--forget",
        "cat",
        "--sets_dir",
        made / f"sets_{name}",
        "--max_train_steps",
        2,
        *few(2),
        "--remember",
        "a dog",
        "a red car",
        "--validation_steps",
        0,
        "--fisher_images",
        2,
        "--fisher_timesteps",
        2,
        "--output_dir",
        out,
        "--cpu",
        *more,
    ]
    return parse(module("options").Unlearn, [str(a) for a in given])


def unlearn(made: Path, name: str, out: Path, *more) -> Path:
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()):
        module("unlearn").unlearn(options(made, name, out, *more))
    return out


# -- what is computed is what the pipeline computes ---------------------------------------------


def opened(made: Path, name: str):
    """The pipeline with a sampler that keeps what its UNet was given, and said."""
    pipe = getattr(diffusers, PIPELINES[name][2]).from_pretrained(made / name)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def prompted(made: Path, name: str, texts: list[str], tmp_path: Path):
    """Looked, and the `Prompted` that a run would train."""
    args, looked = options(made, name, tmp_path).resolved(), look(made / name)
    told = module("sets").conditions(args, looked, made / name, texts, "cpu")
    unet = diffusers.UNet2DConditionModel.from_pretrained(made / name / "unet")
    return looked, module("modules").Prompted(unet, told, looked.family).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_prediction_with_guidance_is_the_pipelines(name, made, tmp_path):
    texts = ["a cat", "", "a red car"]
    looked, model = prompted(made, name, texts, tmp_path)
    pipe, said = opened(made, name), []
    beside = looked.family.drawing(pipe, looked.resolution)
    pipe.unet.register_forward_hook(lambda _m, _i, out: said.append(out[0]))
    noise = torch.randn(1, *looked.latents, generator=torch.Generator().manual_seed(3))
    drawn = pipe(
        "a red car",
        latents=noise,
        num_inference_steps=3,
        guidance_scale=5.0,
        output_type="pt",
        **beside,
    ).images
    t = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        ours = model(noise.expand(2, -1, -1, -1), t.expand(2), torch.tensor([1, 2]))
    torch.testing.assert_close(ours, said[0])
    assert (ours[0] - ours[1]).abs().max() > 1e-4
    args = options(
        made,
        name,
        tmp_path,
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        3,
        "--validation_guidance_scale",
        5,
        "--seed",
        3,
    ).resolved()
    found = module("validation").draw(
        args, model, looked.scheduler, [2], 1, looked.latents, made / name
    )
    assert (found.float() - drawn * 255).abs().max() <= 1


@pytest.mark.parametrize("name", ["sdxl", "sdxl_inpainting"])
def test_the_size_and_the_pooled_embedding_reach_sdxl(name, made, tmp_path):
    looked, model = prompted(made, name, ["a cat", ""], tmp_path)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(made / "sdxl")
    size = (looked.resolution,) * 2
    theirs = pipe._get_add_time_ids(
        size, (0, 0), size, torch.float32, text_encoder_projection_dim=8
    )
    assert torch.equal(model.time_ids, theirs)
    x, t = torch.randn(1, *looked.latents), torch.tensor([500])
    told = model.condition(torch.tensor([0]))
    with torch.no_grad():
        before = model(x, t, **told)
        assert torch.equal(before, model(x, t, torch.tensor([0])))
        told["text_embeds"] = told["text_embeds"] + 1
        assert not torch.allclose(before, model(x, t, **told))
        # beside a number, one of the conditions is another
        pooled = {"text_embeds": told["text_embeds"]}
        assert torch.equal(model(x, t, **told), model(x, t, torch.tensor([0]), **pooled))
    with pytest.raises(ValueError, match=r"needs the conditions .*; text_embeds is missing"):
        model(x, t, encoder_hidden_states=told["encoder_hidden_states"])


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_the_pipelines_guidance_leads_away_from(zeros, made, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(made / "sdxl", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = zeros
    (folder / "model_index.json").write_text(json.dumps(index))
    args, texts = options(tmp_path, "base", tmp_path / "o").resolved(), ["", "a dog"]
    found = module("sets").conditions(args, look(folder), folder, texts, "cpu").each
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    text, null, pooled, pooled_null = pipe.encode_prompt("a dog", do_classifier_free_guidance=True)
    torch.testing.assert_close(found["encoder_hidden_states"], torch.cat([null, text]))
    torch.testing.assert_close(found["text_embeds"], torch.cat([pooled_null, pooled]))
    assert bool(null.abs().max()) != zeros
    # it is kept under another name where the pipeline says otherwise
    mine = module("pipelines").parts(folder, None)["settings"]
    assert (mine == module("pipelines").parts(made / "sdxl", None)["settings"]) == zeros


@pytest.mark.parametrize("name", ["sd", "sdxl_inpainting"])
def test_text_encoders_vae_and_denoiser_are_never_there_together(name, made, tmp_path, monkeypatch):
    conditions, run = module("conditions"), module("unlearn")
    held, together, of = [], [], run.pipelines.load

    def loads(*args):
        there = {kind for kind, part in held if part() is not None}
        part, kind = of(*args), args[0].__name__.partition("With")[0]
        held.append((kind, weakref.ref(part)))
        together.append(there | {kind})
        return part

    monkeypatch.setattr(conditions, "load", loads)
    monkeypatch.setattr(run.pipelines, "load", loads)
    # a whole pipeline is what has all of them
    more = ["--sets_dir", tmp_path / "sets", "--method", "joint", "--save_as", "changed"]
    unlearn(made, name, tmp_path / "o", *more, "--max_train_steps", 1)
    assert {"CLIPTextModel"} in together
    assert {"UNet2DConditionModel"} in together
    assert all(len(kinds) == 1 for kinds in together), together


# -- runs ---------------------------------------------------------------------------------------

METHODS = {
    "ebu": (),
    "joint": (
        "--surrogate",
        "pixels",
        "--mixed_precision",
        "bf16",
        "--gradient_checkpointing",
        "--warm_start",
        "rece",
        "--relearner_steps",
        1,
    ),
    "sa": ("--condition_noise", 1),
    "salun": ("--surrogate_prompt", "dog", "--remember", "a red car"),
    "esd": ("--train_modules", "esd-x-strict"),
    "spm": (),
    "rece": ("--surrogate_prompt", "dog"),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("sdxl", m) for m in METHODS), ("sd_inpainting", "ebu"), ("sdxl_inpainting", "esd")],
)
def test_every_method_trains(name, method, made, tmp_path):
    out = unlearn(made, name, tmp_path / "o", "--method", method, *METHODS[method])
    report = json.loads((out / "unlearn.json").read_text())
    assert report["pipeline"] == PIPELINES[name][2]
    assert report["memory_counted"]["prompts"]["text encoders"] > 0
    file = "diffusion_pytorch_model.safetensors"
    if method == "spm":
        state = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
        assert any(t.abs().max() > 0 for n, t in state.items() if "lora_B" in n or "lora.up" in n)
        return
    a, b = (load_file(folder / "unet" / file) for folder in (made / name, out / "pipeline"))
    moved = {n for n in a if not torch.equal(a[n], b[n])}
    assert moved
    assert all("attn2." in n for n in moved)


def drawn(pipe, looked, prompt: str = "a cat"):
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(0)
    beside = looked.family.drawing(pipe, looked.resolution)
    with torch.no_grad():
        return pipe(prompt, num_inference_steps=2, generator=g, output_type="pt", **beside).images


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("sdxl", ("pipeline", "changed", "lora")),
        ("sd_inpainting", ("pipeline",)),
        ("sdxl_inpainting", ("lora",)),
    ],
)
def test_what_is_saved_draws_the_same_by_every_way(name, ways, made, tmp_path):
    r, p, looked = module("results"), module("pipelines"), look(made / name)
    kind = getattr(diffusers, PIPELINES[name][2])
    lora = ["--train_modules", "lora", "--learning_rate", 1e-1]
    pictures = {}
    for way in ways:
        out = unlearn(made, name, tmp_path / way, *lora, "--save_as", way) / way
        model = p.Model(pretrained_model_name_or_path=str(out))
        pictures[way] = drawn(r.load(model), looked)
        if way == "pipeline":
            assert torch.equal(pictures[way], drawn(kind.from_pretrained(out), looked))
        card = (out / "README.md").read_text()
        code = card.partition("```python\n")[2].partition("```")[0]
        code = code.replace("<this repository or folder>", str(out))
        space: dict = {}
        exec(code, space)  # noqa: S102 - the card's own lines
        assert type(space["pipe"]) is kind
        torch.testing.assert_close(drawn(space["pipe"], looked), pictures[way], atol=1e-4, rtol=0)
    base = drawn(kind.from_pretrained(made / name), looked)
    for picture in pictures.values():
        assert (picture - base).abs().max() > 1e-3
        torch.testing.assert_close(picture, pictures[ways[0]], atol=1e-4, rtol=0)


def test_spms_anchors_are_random_in_every_condition(made, tmp_path, monkeypatch):
    given, of = [], module("objectives").anchor_loss

    def loss(model, teacher, x_t, t, anchors, **more):
        given.append(anchors)
        return of(model, teacher, x_t, t, anchors, **more)

    monkeypatch.setattr(module("objectives"), "anchor_loss", loss)
    unlearn(made, "sdxl", tmp_path / "o", "--method", "spm", "--max_train_steps", 1)
    (anchors,) = given
    shapes = {name: tuple(t.shape) for name, t in anchors.items()}
    assert shapes == {"encoder_hidden_states": (4, LENGTH, 32), "text_embeds": (4, 8)}
    assert all(not torch.equal(t[0], t[1]) for t in anchors.values())


def test_transport_scales_an_adapter_of_sdxl(made, tmp_path):
    out = unlearn(made, "sdxl", tmp_path / "o", "--method", "spm")
    transport, pipe = module("transport"), opened(made, "sdxl")
    erased = transport.load(pipe, [out / "lora"])
    (same,) = transport.scale(pipe, erased, "cat")
    (other,) = transport.scale(pipe, erased, "a red car")
    assert same == pytest.approx(1)
    assert other < same


# -- evaluation and attacks ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sd_inpainting"])
def test_evaluation_draws(name, made, tmp_path):
    from ebu_optim.text_to_image.evaluation import evaluate
    from ebu_optim.text_to_image.evaluation_options import Evaluation

    argv = [
        "--pretrained_model_name_or_path",
        made / name,
        "--prompts",
        "a cat",
        "a dog",
        "--images_per_prompt",
        2,
        "--num_inference_steps",
        2,
        "--metrics",
        "--output_dir",
        tmp_path / "o",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(parse(Evaluation, [str(a) for a in argv]))
    pixels = [p.read_bytes() for p in sorted((tmp_path / "o" / "images").iterdir())]
    assert len(set(pixels)) == 4


@pytest.fixture
def attacked(made, tmp_path):
    def of(name: str):
        run, m = (importlib.import_module(f"ebu_optim.attacks.{n}") for n in ("run", "model"))
        argv = [
            "--pretrained_model_name_or_path",
            made / name,
            "--base_model",
            made / name,
            "--forget",
            "cat",
            "--judge",
            "nudity",
            "--num_inference_steps",
            2,
            "--output_dir",
            tmp_path / "o",
            "--device",
            "cpu",
        ]
        args = parse(run.AttackOptions, [str(a) for a in argv]).resolved()
        looked = look(made / name)
        return m, m.Attacked(module("results").load(args), looked, args, torch.device("cpu"))

    return of


@pytest.mark.parametrize("name", NAMES)
def test_a_known_word_in_the_new_ones_place_is_the_prompt(name, attacked):
    m, model = attacked(name)
    templates = ["a photo of {}", "{} in red"]
    cat = m.initial_words(model, ["cat"], 0)["cat"]
    found = m.NewWord(model, templates, cat).embeddings(torch.arange(2))
    torch.testing.assert_close(found, model.encode([t.format("cat") for t in templates]))


def test_the_learned_word_of_sdxl_is_loaded_by_diffusers(made, attacked):
    m, model = attacked("sdxl")
    word = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ours = m.NewWord(model, ["a photo of {}"], word).embeddings(torch.arange(1))
    pipe, saved = opened(made, "sdxl"), m.by_encoder(model, word, "<new>")
    for part, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        pipe.load_textual_inversion(
            {"<new>": saved[part]},
            token="<new>",  # noqa: S106
            text_encoder=getattr(pipe, part),
            tokenizer=getattr(pipe, words),
        )
    text, _, pooled, _ = pipe.encode_prompt("a photo of <new>")
    told = model.told(ours)
    torch.testing.assert_close(told["encoder_hidden_states"], text)
    torch.testing.assert_close(told["text_embeds"], pooled)


@pytest.mark.parametrize("name", ["sdxl", "sd_inpainting"])
def test_an_attack_goes_through(name, made, tmp_path, monkeypatch):
    run, judges = (importlib.import_module(f"ebu_optim.attacks.{n}") for n in ("run", "judges"))
    bright = judges.Judge(lambda x: x.double().mean((1, 2, 3)).sigmoid(), {"judge": "brightness"})
    monkeypatch.setattr(judges, "load", lambda *_: bright)
    argv = [
        "--pretrained_model_name_or_path",
        made / name,
        "--base_model",
        made / name,
        "--forget",
        "cat",
        "--judge",
        "nudity",
        "--paraphrases",
        "the cat",
        "--attack_images",
        2,
        "--target_images",
        2,
        "--num_inference_steps",
        2,
        "--inversion_steps",
        2,
        "--relearn_max_steps",
        1,
        "--train_batch_size",
        2,
        "--output_dir",
        tmp_path / "o",
        "--device",
        "cpu",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        run.attack(parse(run.AttackOptions, [str(a) for a in argv]))
    found = json.loads((tmp_path / "o" / "attacks.json").read_text())["values"]
    assert {"p_f", "paraphrase", "inversion_2", "relearn_steps"} <= found.keys()
    word = load_file(tmp_path / "o" / "learned_word.safetensors")
    parts = ["text_encoder", "text_encoder_2"] if name == "sdxl" else ["<attack>"]
    assert sorted(word) == parts


# -- memory -------------------------------------------------------------------------------------

XL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "norm_num_groups": 32,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
CLIP = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "vocab_size": 49408,
        "projection_dim": 1280,
    },
}


def test_memory_of_sdxl_is_counted_with_its_text_encoders(made, tmp_path):
    """Of the released configurations: 2.57, 0.123 and 0.695 billion numbers."""
    f, args = module("families"), options(made, "sdxl", tmp_path).resolved()
    tokenizer = look(made / "sdxl").tokenizer
    tokenizer.model_max_length = 77
    looked = module("pipelines").Looked(
        Path(),
        XL,
        VAE,
        1024,
        (4, 128, 128),
        None,
        tokenizer,
        f.named("StableDiffusionXLPipeline"),
        {"unet": XL, "vae": VAE, **CLIP},
    )
    texts = module("prompts").Prompts([""] * 4, [0], [1], [2, 3], 1, [0], {})
    cost = module("memory").count(args, looked, texts)
    assert cost.trained + cost.frozen == 2_567_463_684
    assert cost.phases["prompts"] == {"text encoders": 4 * (123_060_480 + 694_659_840)}
    held = cost.phases["unlearning"]
    assert held["frozen weights"] + held["trained weights"] == 4 * 2_567_463_684
    assert held["prompts"] == 4 * 4 * (77 * 2048 + 1280)
    one = module("memory").passes(
        look_unet(looked.unet), looked._replace(resolution=512, latents=(4, 64, 64))
    )
    assert 0 < one.kept < held["activations"]


def look_unet(config):
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(config)


# -- what is refused ----------------------------------------------------------------------------


def edited(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


OTHER = {
    "StableDiffusionXLImg2ImgPipeline": "Stable Diffusion XL's refiner",
    "StableDiffusionImg2ImgPipeline": "Stable Diffusion for image to image",
    "StableDiffusionUpscalePipeline": "an upscaler",
    "FluxFillPipeline": "a variant of FLUX.1",
    "StableDiffusion3Img2ImgPipeline": "a variant of Stable Diffusion 3",
    "Flux2Pipeline": "FLUX.2 dev",
    "KandinskyV22Pipeline": "Kandinsky",
}


@pytest.mark.parametrize("kind", OTHER)
def test_another_pipeline_is_named_before_weights_are_looked_for(kind, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(InputError, match=f"is a {kind}, {OTHER[kind]}.*; supported are") as error:
        look(tmp_path)
    assert all(known in str(error.value) for _, _, known in PIPELINES.values())
    assert "\n" not in str(error.value)


WRONG = {
    "the refiner is not supported": (
        "sdxl",
        lambda f: edited(f, "unet/config.json", projection_class_embeddings_input_dim=48),
    ),
    "has no text_encoder: Stable Diffusion XL needs it": (
        "sdxl",
        lambda f: edited(f, "model_index.json", text_encoder=[None, None]),
    ),
    "its text encoder makes 16 \\+ 24": (
        "sdxl",
        lambda f: edited(f, "text_encoder_2/config.json", hidden_size=24),
    ),
    "has a latents_mean": ("sdxl", lambda f: edited(f, "vae/config.json", latents_mean=[0.0] * 4)),
    "addition_embed_type None": (
        "sdxl",
        lambda f: edited(f, "unet/config.json", addition_embed_type=None),
    ),
    "text_encoder_2 is a CLIPTextModel, not a CLIPTextModelWithProjection": (
        "sdxl",
        lambda f: edited(f, "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
    ),
    "takes 4 and predicts 4": (
        "sd_inpainting",
        lambda f: edited(f, "unet/config.json", in_channels=4),
    ),
    "9 channels and the VAE makes 4": (
        "sdxl",
        lambda f: edited(f, "unet/config.json", in_channels=9),
    ),
    "different vocabularies or lengths": (
        "sdxl",
        lambda f: edited(f, "tokenizer_2/tokenizer_config.json", model_max_length=7),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit_are_told(message, made, tmp_path):
    name, change = WRONG[message]
    shutil.copytree(made / name, tmp_path / "wrong")
    change(tmp_path / "wrong")
    with pytest.raises(InputError, match=message):
        look(tmp_path / "wrong")


@pytest.mark.parametrize("kind", ["xlayer", "selflayer"])
def test_single_layers_of_sd_1_are_refused_for_sdxl(kind, made, tmp_path):
    with pytest.raises(
        InputError, match=f"--train_modules {kind} is not supported for Stable Diffusion XL"
    ):
        unlearn(made, "sdxl", tmp_path / "o", "--train_modules", kind)
    assert not (tmp_path / "o").exists()
