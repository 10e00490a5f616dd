"""Runs of forgetting on families with a transformer, in small: every method, every form of the
result, what goes on, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5", reason="the tiny tokenizers are made as of 5")
pytest.importorskip("peft", reason="peft comes with the extra text_to_image")

import diffusers
from safetensors.torch import load_file, save_file

from ebu_optim.errors import InputError
from ebu_optim.takedown import planning
from ebu_optim.takedown.options import Forget
from ebu_optim.training.command_line import parse

from .flow_families import MADE, look, module, opened, size, unlearn
from .flow_files import original
from .scripts import reset_accelerate

FILE = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "Flux2KleinPipeline"), reason="this diffusers has no FLUX.2 klein"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("flow")
    for name, make in MADE.items():
        make(out / name)
    return out


# -- runs ---------------------------------------------------------------------------------------

BF16 = ("--mixed_precision", "bf16", "--gradient_checkpointing")
#: Family, method, options, and what is in the names of the weights that move.
RUNS = [
    (
        "sd3",
        "ebu",
        ("--condition_noise", 1, "--adversary_steps", 2),
        (".add_k_proj.", ".add_v_proj."),
    ),
    ("sd3", "joint", ("--surrogate", "pixels", *BF16), (".add_k_proj.", ".add_v_proj.")),
    ("sd3", "sa", ("--train_modules", "attention", "--surrogate", "analytic"), (".attn.",)),
    (
        "sd3",
        "esd",
        ("--train_modules", "context", "--remember_loss", "replay"),
        ("context_embedder",),
    ),
    ("sd3_without_t5", "ebu", (), (".add_k_proj.", ".add_v_proj.")),
    ("flux_dev", "esd", (), (".add_k_proj.", ".add_v_proj.")),
    ("flux_dev", "ebu", ("--train_modules", "single", *BF16), ("single_transformer_blocks",)),
    (
        "flux_schnell",
        "salun",
        ("--train_modules", "full", "--surrogate_prompt", "dog", "--remember", "a red car"),
        ("",),
    ),
    ("klein", "sa", ("--train_modules", "attention", *BF16), (".attn.",)),
    ("klein_distilled", "ebu", (), (".add_k_proj.", ".add_v_proj.")),
    ("z_image", "esd", ("--train_modules", "context", *BF16), ("cap_embedder",)),
    ("z_image", "ebu", ("--surrogate", "pixels"), (".attention.to_k.", ".attention.to_v.")),
    ("pixart", "ebu", ("--condition_noise", 1, *BF16), (".attn2.",)),
    (
        "pixart",
        "salun",
        ("--train_modules", "attention", "--surrogate_prompt", "dog", "--remember", "a red car"),
        (".attn1.", ".attn2."),
    ),
    ("pixart", "esd", ("--train_modules", "esd-x-strict"), (".attn2.to_k.", ".attn2.to_v.")),
    ("pixart", "joint", ("--train_modules", "context"), ("caption_projection.",)),
    ("qwen_image", "ebu", ("--surrogate", "pixels"), (".add_k_proj.", ".add_v_proj.")),
    ("qwen_image", "esd", ("--train_modules", "context", *BF16), ("txt_in.",)),
    ("qwen_image", "joint", ("--train_modules", "full", "--remember_loss", "replay"), ("",)),
    ("sana", "ebu", ("--surrogate", "pixels"), (".attn2.",)),
    ("sana", "esd", ("--train_modules", "esd-x-strict", *BF16), (".attn2.to_k.", ".attn2.to_v.")),
    (
        "sana",
        "salun",
        ("--train_modules", "selfattn", "--surrogate_prompt", "dog", "--remember", "a red car"),
        (".attn1.",),
    ),
]


@pytest.mark.parametrize(("name", "method", "more", "where"), RUNS)
def test_a_method_trains_what_it_is_to_train(name, method, more, where, made, tmp_path):
    out = unlearn(made / name, tmp_path / "o", "--method", method, *more)
    report = json.loads((out / "unlearn.json").read_text())
    assert report["pipeline"] == look(made / name).family.pipeline.__name__
    assert report["memory_counted"]["prompts"]["text encoders"] > 0
    a, b = (load_file(f / "transformer" / FILE) for f in (made / name, out / "pipeline"))
    moved = {n for n in a if not torch.equal(a[n], b[n])}
    assert moved
    assert all(any(part in n for part in where) for n in moved)
    assert all(t.isfinite().all() for t in b.values())


def drawn(pipe, family) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    side = size(Path(family.name.lower()))
    with torch.no_grad():
        return pipe(
            prompt="a cat",
            num_inference_steps=2,
            output_type="pt",
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(0),
            **family.drawing(pipe, side),
        ).images


@pytest.mark.parametrize("name", ["sd3", "sd3_without_t5", "flux_dev", "klein", "z_image", "sana"])
def test_what_is_saved_draws_the_same_by_every_way(name, made, tmp_path):
    r, p, fuse = module("results"), module("pipelines"), module("ebu_optim.formats").fuse
    family = look(made / name).family
    lora = ["--train_modules", "lora", "--learning_rate", 1e-1]
    found = {}
    ways = ("pipeline", "changed", "lora", "kohya")
    ways = {"sd3_without_t5": ways[:3:2], "sana": ways[:3]}.get(name, ways)
    for way in ways:
        out = unlearn(made / name, tmp_path / way, *lora, "--save_as", way) / way
        if way == "kohya":
            pipe = opened(made / name)
            fuse(pipe, out / "kohya.safetensors")
            found[way] = drawn(pipe, family)
        else:
            found[way] = drawn(r.load(p.Model(pretrained_model_name_or_path=str(out))), family)
        if way == "pipeline":
            assert torch.equal(found[way], drawn(opened(out), family))
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        space: dict = {}
        exec(code.replace("<this repository or folder>", str(out)), space)  # noqa: S102 - the card's
        torch.testing.assert_close(drawn(space["pipe"], family), found[way], atol=1e-4, rtol=0)
    base = drawn(opened(made / name), family)
    for picture in found.values():
        assert (picture - base).abs().max() > 1e-3
        torch.testing.assert_close(picture, found["pipeline"], atol=1e-5, rtol=0)


def test_pixarts_weights_draw_the_same_by_every_way(made, tmp_path):
    """Without LoRAs, which diffusers has not of it."""
    r, p, name = module("results"), module("pipelines"), "pixart"
    family, found = look(made / name).family, []
    for way in ("pipeline", "changed"):
        out = unlearn(made / name, tmp_path / way, "--learning_rate", 1e-1, "--save_as", way) / way
        found.append(drawn(r.load(p.Model(pretrained_model_name_or_path=str(out))), family))
        code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        space: dict = {}
        exec(code.replace("<this repository or folder>", str(out)), space)  # noqa: S102 - the card's
        assert torch.equal(drawn(space["pipe"], family), found[-1])
    assert torch.equal(*found)
    assert (found[0] - drawn(opened(made / name), family)).abs().max() > 1e-3


# -- one file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("sd3", "model.diffusion_model."),
        ("klein", ""),
        ("z_image", ""),
        ("sana", ""),
        ("qwen_image", ""),
    ],
)
def test_a_transformer_in_one_file_comes_back_as_one(name, prefix, made, tmp_path):
    state = load_file(made / name / "transformer" / FILE)
    given = {prefix + n: t.contiguous() for n, t in original(name, state).items()}
    given |= {"first_stage_model.other": torch.randn(3)} if prefix else {}
    unread = {"z_image": ["norm_final.weight"], "sana": ["pos_embed", "y_embedder.y_embedding"]}
    given |= {n: torch.ones(2) for n in unread.get(name, ())}
    file = tmp_path / "given.safetensors"
    save_file(given, file, metadata={"modelspec.title": "mine"})
    kind = look(made / name).family.kind("transformer")
    theirs = (
        kind.from_single_file(
            str(file), config=str(made / name), subfolder="transformer", local_files_only=True
        )
        if name in ("sd3", "sana", "qwen_image")
        else None
    )
    out = unlearn(
        file,
        tmp_path / "o",
        "--architecture",
        made / name,
        "--train_modules",
        "full",
        "--sets_dir",
        made / f"sets_{name}",
        "--resolution",
        size(made / name),
    )
    (result,) = (out / "single").glob("*.safetensors")
    new = load_file(result)
    assert new.keys() == given.keys()
    for beside in ("first_stage_model.other", *unread.get(name, ())):
        assert beside not in given or torch.equal(new[beside], given[beside])
    assert sum(not torch.equal(new[n], given[n]) for n in new) > 10
    # the same run of the folder has the same weights
    other = unlearn(made / name, tmp_path / "p", "--train_modules", "full")
    whole = load_file(other / "pipeline" / "transformer" / FILE)
    back = {prefix + n: t for n, t in original(name, whole).items()}
    assert not [n for n, t in back.items() if not torch.equal(new[n], t)]
    if theirs is not None:
        assert all(torch.equal(theirs.state_dict()[n], t) for n, t in state.items())
        code = (out / "single" / "README.md").read_text().partition("```python\n")[2]
        code = code.partition("```")[0].replace("<this repository or folder>", f"{out / 'single'}")
        space: dict = {}
        exec(code, space)  # noqa: S102 - the card's
        family = look(made / name).family
        assert torch.equal(drawn(space["pipe"], family), drawn(opened(other / "pipeline"), family))


def test_flux_in_one_file_is_found_tensor_by_tensor():
    """At its width alone, which diffusers has written down."""
    from ebu_optim.formats.names import fits, rows

    with torch.device("meta"):
        state = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True
        ).state_dict()
        given = original("flux", state)
    shapes = {n: tuple(t.shape) for n, t in given.items()}
    config = {"_class_name": "FluxTransformer2DModel"}
    found = rows("transformer", shapes, config, state)
    assert found.keys() == state.keys()
    assert {at.key for at in found.values()} == given.keys()
    assert all(fits(shapes[at.key], at, tuple(state[n].shape)) for n, at in found.items())


def test_a_transformers_file_needs_the_other_parts(made, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(original("z_image", load_file(made / "z_image" / "transformer" / FILE)), file)
    wrong = {
        r"give config= \(--architecture\), a diffusers folder": (),
        r"is Z-Image \(ZImagePipeline\), and .* is a FluxPipeline": (
            "--architecture",
            made / "flux_dev",
        ),
        "predicts velocities": ("--architecture", made / "z_image", "--prediction_type", "epsilon"),
        "vae .*: the VAE of Z-Image comes from config=": (
            "--architecture",
            made / "z_image",
            "--vae",
            file,
        ),
        "lora .* is not supported for Z-Image in one file": (
            "--architecture",
            made / "z_image",
            "--lora",
            file,
        ),
    }
    for message, more in wrong.items():
        with pytest.raises(InputError, match=message):
            unlearn(file, tmp_path / "o", *more)
    scaled = tmp_path / "scaled.safetensors"
    save_file({"cap_pad_token": torch.ones(1), "layers.0.w.scale_weight": torch.ones(1)}, scaled)
    with pytest.raises(InputError, match=r"quantized weights with scales \(layers.0.w.scale"):
        unlearn(scaled, tmp_path / "o", "--architecture", made / "z_image")


# -- what goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "klein", "pixart", "sana", "qwen_image"])
def test_a_run_goes_on_bit_for_bit(name, made, tmp_path):
    more = [
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        2,
        "--train_modules",
        "attention",
        "--adversary_steps",
        1,
        "--adversary_restart",
        3,
        "--relearner_steps",
        1,
    ]
    whole = unlearn(made / name, tmp_path / "whole", *more)
    part = unlearn(made / name, tmp_path / "part", *more)
    shutil.rmtree(part / "pipeline")
    (last,) = (part / "checkpoints").glob("*4")
    shutil.rmtree(last)
    unlearn(made / name, part, *more, "--resume_from_checkpoint", "latest")
    a, b = (load_file(f / "pipeline" / "transformer" / FILE) for f in (whole, part))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["flux_dev", "z_image", "pixart", "sana", "qwen_image"])
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
        "--resolution",
        size(made / name),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(parse(Evaluation, [str(a) for a in argv]))
    pixels = [p.read_bytes() for p in sorted((tmp_path / "o" / "images").iterdir())]
    assert len(set(pixels)) == 4


def request(model: Path, out: Path, **more):
    from ebu_optim.takedown import forget

    reset_accelerate()
    options: dict = {
        "resolution": size(model),
        "num_inference_steps": 2,
        "max_train_steps": 2,
        "replay_images": 2,
        "surrogate_images": 2,
        "cpu": True,
        "evidence_images": 1,
        "clip_weights": "none",
        "learning_rate": 1e-1,
        "validation_steps": 0,
        **more,
    }
    return forget(str(model), "cat", keep=["a dog"], output_dir=out, **options)


def test_a_request_is_answered_by_a_lora_with_its_report(made, tmp_path, capsys):
    more = {"train_modules": "lora", "save_as": "kohya"}
    assert request(made / "flux_dev", tmp_path / "o", plan=True, **more) is None
    assert "guidance-distilled" in capsys.readouterr().out
    found = request(made / "flux_dev", tmp_path / "o", **more)
    assert found.figures["change, target"]["value"] > 0


@pytest.mark.parametrize(("precision", "dtype"), [("no", "float32"), ("bf16", "bfloat16")])
def test_the_report_draws_in_what_the_text_encoders_read_in(precision, dtype, made, tmp_path):
    """FLUX.1 in float32 takes 60 GB: more than the card on which a LoRA of it is trained."""
    found = request(made / "z_image", tmp_path / "o", mixed_precision=precision)
    page = json.loads((found.folder / "report" / "results.json").read_text())
    assert page["protocol"]["sampling"]["dtype"] == dtype
    args = Forget(
        pretrained_model_name_or_path=str(made / "z_image"),
        forget=["cat"],
        output_dir=tmp_path / "p",
        resolution=size(made / "z_image"),
        mixed_precision=precision,
    ).resolved()
    rows = planning.check(args).cost.phases["report"]
    parts = {"frozen weights": "transformer", "text encoders": "text_encoder"}
    for what, part in parts.items():
        weights = getattr(found.pipeline, part).parameters()
        assert rows[what] == getattr(torch, dtype).itemsize * sum(p.numel() for p in weights)


@pytest.mark.parametrize("name", ["pixart", "sana", "qwen_image"])
def test_a_request_is_answered_by_a_folder_with_its_report(name, made, tmp_path, capsys):
    found = request(made / name, tmp_path / "o")
    assert found.figures["change, target"]["value"] > 0
    assert request(made / name, tmp_path / "p", plan=True) is None
    assert "trained: full" in capsys.readouterr().out


def test_a_request_with_a_file_is_answered_by_a_file_with_its_report(made, tmp_path):
    file = tmp_path / "sd3.safetensors"
    save_file(original("sd3", load_file(made / "sd3" / "transformer" / FILE)), file)
    found = request(file, tmp_path / "o", architecture=made / "sd3")
    assert found.figures["change, target"]["value"] > 0
    assert [p.name for p in (found.folder / "single").glob("*.safetensors")] == ["o.safetensors"]


# -- what is refused ----------------------------------------------------------------------------

LONG = " ".join(["cat"] * 500)


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        (
            "sd3",
            ("--method", "spm"),
            "spm is not supported for Stable Diffusion 3 and 3.5: SPM's adapters",
        ),
        (
            "sd3",
            ("--save_as", "single"),
            "--save_as single: .*is not a file: give the transformer's file",
        ),
        (
            "sd3",
            ("--train_modules", "esd-u"),
            "esd-u .* give one of xattn, attention, context, full",
        ),
        (
            "flux_dev",
            ("--train_modules", "selfattn"),
            "give one of xattn, attention, single, context",
        ),
        ("sd3", ("--resolution", 194), "must be a multiple of 4"),
        ("klein", ("--resolution", 18), "must be a multiple of 4"),
        ("sd3", ("--resolution", 196), "must be <= 96"),
        (
            "flux_schnell",
            ("--guidance_scale", 3.5),
            "this FLUX.1 is distilled and takes no guidance",
        ),
        ("klein_distilled", ("--validation_guidance_scale", 4), "distilled and takes no guidance"),
        (
            "flux_dev",
            ("--guidance_scale", 3, "--validation_guidance_scale", 4),
            "takes one guidance",
        ),
        (
            "z_image",
            ("--mixed_precision", "fp16"),
            "fp16 is not supported for Z-Image: its activations",
        ),
        ("sd3", ("--forget", LONG), "begin and end included, and the tokenizer takes 12"),
        ("flux_schnell", ("--forget", LONG), "begin and end included, and the tokenizer takes 256"),
        ("flux_dev", ("--forget", LONG), "begin and end included, and the tokenizer takes 512"),
        ("klein", ("--forget", LONG), "begin and end included, and the tokenizer takes 493"),
        ("pixart", ("--forget", LONG), "begin and end included, and the tokenizer takes 300"),
        (
            "pixart",
            ("--train_modules", "lora"),
            "lora is not supported for PixArt-Sigma: diffusers supports neither",
        ),
        (
            "pixart",
            ("--train_modules", "noxattn"),
            "give one of xattn, selfattn, attention, context",
        ),
        (
            "pixart",
            ("--save_as", "single"),
            "--save_as single is not supported .* diffusers cannot load it",
        ),
        (
            "qwen_image",
            ("--mixed_precision", "fp16"),
            "fp16 is not supported for Qwen-Image: its activations",
        ),
        ("sana", ("--forget", LONG), "begin and end included, and the tokenizer takes 299"),
        (
            "sana",
            ("--train_modules", "lora", "--save_as", "kohya"),
            "kohya is not supported for Sana: ComfyUI",
        ),
        ("sana", ("--resolution", 16), "must be a multiple of 32"),
        ("pixart", ("--method", "spm"), "spm is not supported for PixArt-Sigma: SPM's adapters"),
        (
            "pixart",
            ("--method", "uce"),
            "uce is not supported for PixArt-Sigma: UCE edits the keys",
        ),
        ("sd3", ("--method", "speed"), "speed is not supported for .*: SPEED edits the keys and"),
        ("pixart", ("--warm_start", "uce"), "uce: the keys and values of PixArt-Sigma do not read"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(name, given, why, made, tmp_path):
    with pytest.raises(InputError, match=why):
        unlearn(made / name, tmp_path / "o", *given)
    assert not (tmp_path / "o").exists()


def edited(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SCHEDULER, TRANSFORMER = "scheduler/scheduler_config.json", "transformer/config.json"
WRONG = {
    "its scheduler is a DDIMScheduler": ("sd3", SCHEDULER, {"_class_name": "DDIMScheduler"}),
    "with invert_sigmas": ("sd3", SCHEDULER, {"invert_sigmas": True}),
    "use_dynamic_shifting": ("sd3", SCHEDULER, {"use_dynamic_shifting": True}),
    "takes 32 channels": ("sd3", TRANSFORMER, {"in_channels": 32}),
    "pooled ones of 32": ("sd3", TRANSFORMER, {"pooled_projection_dim": 32}),
    "make 32 and 64": ("sd3", "text_encoder_3/config.json", {"d_model": 32}),
    "different vocabularies or lengths": (
        "sd3",
        "tokenizer_2/tokenizer_config.json",
        {"model_max_length": 7},
    ),
    "has no text_encoder_2": ("sd3", "model_index.json", {"text_encoder_2": [None, None]}),
    "takes 96 channels and predicts 16":  # FLUX.1 Fill
    ("flux_dev", TRANSFORMER, {"in_channels": 96, "out_channels": 16}),
    "make 32 and 24": ("flux_dev", "text_encoder/config.json", {"hidden_size": 24}),
    "(FluxPipeline) has no text_encoder_2": (
        "flux_dev",
        "model_index.json",
        {"text_encoder_2": [None, None]},
    ),
    "takes text embeddings of 48, its text encoder makes 3 times 8": (
        "klein",
        "text_encoder/config.json",
        {"hidden_size": 8},
    ),
    "has 9 layers; klein needs the outputs of the 9th": (
        "klein",
        "text_encoder/config.json",
        {"num_hidden_layers": 9},
    ),
    "takes a guidance scale, as FLUX.2 dev": ("klein", TRANSFORMER, {"guidance_embeds": True}),
    "(ZImagePipeline) has no text_encoder": (
        "z_image",
        "model_index.json",
        {"text_encoder": [None, None]},
    ),
    "takes text embeddings of 16, its text encoder makes 8": (
        "z_image",
        "text_encoder/config.json",
        {"hidden_size": 8},
    ),
    "takes sizes (use_additional_conditions)": (
        "pixart",
        TRANSFORMER,
        {"use_additional_conditions": True},
    ),
    "takes text embeddings of 24, its text encoder makes 32": (
        "pixart",
        TRANSFORMER,
        {"caption_channels": 24},
    ),
    "takes 4 channels and predicts 12": ("pixart", TRANSFORMER, {"out_channels": 12}),
    "its transformer has zero_cond_t": ("qwen_image", TRANSFORMER, {"zero_cond_t": True}),
    "takes 32 channels and predicts 16": ("qwen_image", TRANSFORMER, {"in_channels": 32}),
    "takes text embeddings of 8, its text encoder makes 16": (
        "qwen_image",
        TRANSFORMER,
        {"joint_attention_dim": 8},
    ),
    "its scheduler is a DPMSolverMultistepScheduler; Sana": (
        "sana",
        SCHEDULER,
        {"prediction_type": "epsilon"},
    ),
    "takes text embeddings of 24, its text encoder makes 8": (
        "sana",
        TRANSFORMER,
        {"caption_channels": 24},
    ),
    "takes 8 channels and predicts 4": ("sana", TRANSFORMER, {"in_channels": 8}),
    "prediction_type is 'flow_prediction'": (
        "pixart",
        SCHEDULER,
        {"prediction_type": "flow_prediction"},
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_parts_that_do_not_fit_are_told(message, made, tmp_path):
    name, file, values = WRONG[message]
    shutil.copytree(made / name, tmp_path / "wrong")
    edited(tmp_path / "wrong", file, **values)
    with pytest.raises(InputError, match=re.escape(message)):
        look(tmp_path / "wrong")


def attacked(made: Path, name: str, out: Path):
    run, model = module("ebu_optim.attacks.run"), module("ebu_optim.attacks.model")
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
        out,
        "--device",
        "cpu",
        "--resolution",
        size(made / name),
    ]
    args = parse(run.AttackOptions, [str(a) for a in argv]).resolved()
    pipe = module("results").load(args)
    return model, model.Attacked(pipe, look(made / name), args, torch.device("cpu"))


ONE_ENCODER = ["klein", "z_image", "pixart", "sana", "qwen_image"]


@pytest.mark.parametrize("name", ONE_ENCODER)
def test_known_tokens_in_the_new_ones_place_are_the_prompt(name, made, tmp_path):
    _, model = attacked(made, name, tmp_path)
    (table,) = (e.get_input_embeddings().weight for e in model.text_encoders)
    before, after = (
        model.tokenizers["tokenizer"](t, add_special_tokens=False).input_ids
        for t in ("a photo of", "a photo of cat")
    )
    ids = after[len(before) :]
    words = module("ebu_optim.attacks.words").Words(model, len(ids))
    known = model.tokenizers["tokenizer"].get_vocab()
    found = words.encode([f"a photo of {' '.join(words.names)}", "a dog"], [table[ids]])
    right = model.encode(["a photo of cat", "a dog"])
    assert torch.equal(found, right)
    assert not torch.equal(found, words.encode(["a photo of", "a dog"], [table[ids]]))
    assert known == model.tokenizers["tokenizer"].get_vocab()
    assert model.pipe.tokenizer is model.tokenizers["tokenizer"]


def test_an_error_leaves_no_word_behind(made, tmp_path, monkeypatch):
    m, model = attacked(made, "flux_dev", tmp_path)
    before, hooks = (
        model.encode(["a photo of cat"]),
        [len(e._forward_pre_hooks) for e in model.text_encoders],
    )
    word = m.NewWord(model, ["a photo of {}"], m.initial_words(model, [], 0)["random"])

    def failing(_texts):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "read", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            word.embeddings(torch.arange(1))
    assert [len(e._forward_pre_hooks) for e in model.text_encoders] == hooks
    assert model.pipe.tokenizer_2 is model.tokenizers["tokenizer_2"]
    assert torch.equal(model.encode(["a photo of cat"]), before)


@pytest.mark.parametrize("name", ["sd3", "sd3_without_t5", "flux_dev"])
def test_a_known_word_in_the_new_ones_place_is_the_prompt_to_clip(name, made, tmp_path):
    m, model = attacked(made, name, tmp_path)
    templates = ["a photo of {}", "{} in red"]
    tables = [e.get_input_embeddings().weight for e in model.text_encoders]
    words = model.tokenizers.values()
    cat = torch.cat([t[w("cat").input_ids[1]] for t, w in zip(tables, words, strict=True)])
    found = model.told(m.NewWord(model, templates, cat).embeddings(torch.arange(2)))
    right = model.told(model.encode([t.format("cat") for t in templates]))
    clip = {"pooled_projections"}
    if name == "sd3_without_t5":
        clip |= {"encoder_hidden_states"}
    for n in clip:
        torch.testing.assert_close(found[n], right[n])


@pytest.mark.parametrize("name", MADE)
def test_every_text_encoder_learns_the_new_word(name, made, tmp_path):
    """The gradient of each encoder's part is that of finite differences, and is not zero."""
    m, model = attacked(made, name, tmp_path)
    initial = m.initial_words(model, [], 0)["random"]
    word = m.NewWord(model, ["a photo of {} in red"], initial)
    weight = word.word.weight.requires_grad_()
    probe = torch.linspace(-1, 1, len(model.null.flatten()))

    def value() -> torch.Tensor:
        return word.embeddings(torch.arange(1)).flatten() @ probe

    (gradient,) = torch.autograd.grad(value(), weight)
    sizes = [e.get_input_embeddings().embedding_dim for e in model.text_encoders]
    for part in torch.arange(len(initial)).split(sizes):
        direction = torch.zeros_like(weight)
        direction[0, part] = gradient[0, part] / gradient[0, part].norm()
        step, values = 1e-2, []
        with torch.no_grad():
            for sign in (1, -1):
                weight += sign * step * direction
                values.append(value().item())
                weight -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(gradient[0, part].norm().item(), rel=0.05)
        assert slope > 0


@pytest.mark.parametrize("name", [*ONE_ENCODER, "sd3_without_t5"])
def test_free_tokens_are_read_as_they_are_in_the_prompt(name, made, tmp_path):
    from ebu_optim.attacks.unlearndiffatk import FreeTokens, Settings

    _, model = attacked(made, name, tmp_path)
    free = FreeTokens(model, "a dog", Settings(tokens=2))
    ids = model.tokenizers["tokenizer"]("a cat", add_special_tokens=False).input_ids[-2:]
    chosen = torch.nn.functional.one_hot(torch.tensor(ids), free.vocabulary).float()
    own = {n: t[ids] for n, t in free.tables.items()}
    found = free.embeddings(chosen)
    text = " ".join([*free.words.names, "a dog"])
    assert torch.equal(found, free.words.encode([text], list(own.values())))
    assert free.text(torch.tensor(ids)).endswith(" a dog")


@pytest.mark.parametrize("name", ["sd3", "flux_dev", *ONE_ENCODER])
def test_an_attack_goes_through(name, made, tmp_path, monkeypatch):
    run, judges = module("ebu_optim.attacks.run"), module("ebu_optim.attacks.judges")
    # below 0.5, so that unlearndiffatk has to search
    dim = judges.Judge(lambda x: x.double().mean((1, 2, 3)).sigmoid() / 4, {"judge": "brightness"})
    monkeypatch.setattr(judges, "load", lambda *_: dim)
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
        "--resolution",
        size(made / name),
        "--cce_steps",
        2,
        "--unlearndiffatk_timesteps",
        2,
        "--unlearndiffatk_iterations",
        1,
        "--tina_steps",
        2,
        "--tina_refinements",
        1,
        "--attacks",
        "paraphrase",
        "relearn",
        "tina",
        "lora_relearn",
        "inversion",
        "cce",
        "unlearndiffatk",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        run.attack(parse(run.AttackOptions, [str(a) for a in argv]))
    found = json.loads((tmp_path / "o" / "attacks.json").read_text())["values"]
    assert {"p_f", "paraphrase", "relearn_steps", "lora_relearn_steps"} <= found.keys()
    assert {"tina", "tina_error", "tina_control_error"} <= found.keys()
    assert {"inversion_2", "cce", "unlearndiffatk"} <= found.keys()
    word = load_file(tmp_path / "o" / "learned_word.safetensors")
    encoders = list(look(made / name).family.encoders)
    assert sorted(word) == (sorted(encoders) if len(encoders) > 1 else ["<attack>"])


def test_an_attack_draws_by_the_models_own_guidance(made, tmp_path):
    _, model = attacked(made, "qwen_image", tmp_path)
    ours = model.pictures(model.latents(model.encode(["a cat"]), 0))
    family, pipe = model.family, opened(made / "qwen_image")
    noise = torch.randn(1, *model.shape, generator=module("ebu_optim.modules").stream(0, 0))
    packed = pipe._pack_latents(noise, *noise.shape)
    theirs = pipe(
        prompt="a cat",
        height=16,
        width=16,
        num_inference_steps=2,
        output_type="pt",
        latents=packed,
        **family.guiding(model.args.guidance_scale),
    ).images
    torch.testing.assert_close(ours / 2 + 0.5, theirs, atol=1e-4, rtol=0)


def test_what_is_distilled_is_said(made):
    what = {n: look(made / n).family.distilled(f"x/{n}", look(made / n).unet) for n in MADE}
    assert {n for n, why in what.items() if why} == {"flux_dev", "flux_schnell", "klein_distilled"}
    z = look(made / "z_image")
    assert "train Z-Image" in z.family.distilled("x/Z-Image-Turbo", z.unet)
    assert z.family.usual_of("x/Z-Image-Turbo") == 1
    sd3 = look(made / "sd3")
    assert "train" in sd3.family.distilled("stable-diffusion-3.5-large-turbo", sd3.unet)
