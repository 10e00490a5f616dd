"""`ebu forget` from a file to the file without the concept, with what is handed over beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from diffusers import StableDiffusionPipeline

import ebu_optim
from ebu_optim import cli
from ebu_optim.errors import InputError
from ebu_optim.formats import open_single, write_folder
from ebu_optim.takedown import counting, evidence, fitting, pictures
from ebu_optim.takedown.classes import ForgetClasses
from ebu_optim.takedown.options import PRESETS, Forget
from ebu_optim.text_to_image import save

from .models import schedule, tiny_unet
from .processes import PATIENCE
from .single_files import draw, folder, metadata, tensors

SMALL = [
    "--surrogate_images",
    "2",
    "--replay_images",
    "2",
    "--forget_images",
    "2",
    "--num_inference_steps",
    "2",
    "--max_train_steps",
    "2",
    "--evidence_images",
    "1",
    "--evidence_prompts",
    "1",
    "--clip_weights",
    "none",
    "--cpu",
    "--learning_rate",
    "1e-3",
    "--validation_steps",
    "0",
]
REQUEST = ["cat", "--as", "car", "--keep", "a red car", "a dog"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setenv("EBU_OPTIM_CACHE", str(tmp_path / "cache"))


def run(*argv: object) -> int:
    """The command's status."""
    try:
        cli.main([str(a) for a in argv])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def one_file(family: str, to: Path) -> tuple[Path, Path]:
    """A small model as a file and as a folder."""
    base = folder(family, to / "base")
    return write_folder(base, {}, to / "model.safetensors"), base


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd1_inpainting", "sdxl"])
def test_a_file_in_and_the_file_without_the_concept_out(family, tmp_path, capsys):
    file, base = one_file(family, tmp_path)
    out = tmp_path / "without_cat"
    argv = ["forget", file, *REQUEST, "-o", out, "--architecture", base, *SMALL]
    assert run(*argv) == 0
    made = out / "single" / "without_cat.safetensors"
    before, after = tensors(file), tensors(made)
    assert before.keys() == after.keys()
    different = {k for k in before if not torch.equal(before[k], after[k])}
    assert different
    assert all(k.startswith("model.diffusion_model.") for k in different)
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert metadata(made).keys() >= metadata(file).keys()
    # the file draws what the trained weights draw, bit for bit
    pipe = open_single(file, config=base)
    trained = torch.load(  # what the run's last checkpoint holds
        next((out / "checkpoints").glob("*/trained.pt")), weights_only=True
    )
    pipe.unet.load_state_dict(trained, strict=False)
    assert torch.equal(draw(open_single(made, config=base)), draw(pipe))
    assert (out / "report" / "report.html").is_file()
    assert run("verify", out) == 0
    capsys.readouterr()
    assert run("show", out) == 0
    said = capsys.readouterr().out
    assert "change, target" in said
    assert "report.html" in said


@pytest.mark.parametrize("method", ["uce", "rece", "speed"])
def test_an_edit_in_closed_form_by_the_command(method, tmp_path, capsys):
    file, base = one_file("sd1", tmp_path)
    out = tmp_path / "without_cat"
    argv = ["forget", file, *REQUEST, "-o", out, "--architecture", base, *SMALL]
    argv += ["--method", method]
    assert run(*argv, "--plan") == 0
    said = capsys.readouterr().out
    assert f"method: {method.upper()}" in said
    assert "passes through the model: none" in said
    assert "evidence.json, run.yaml\n" in f"{said}\n"
    assert "without effect on this run: --train_batch_size" not in said
    assert not out.exists()
    assert run(*argv) == 0
    before, after = tensors(file), tensors(out / "single" / "without_cat.safetensors")
    ends = (
        ("attn2.to_v.weight",) if method == "speed" else ("attn2.to_k.weight", "attn2.to_v.weight")
    )
    different = {k for k in before if not torch.equal(before[k], after[k])}
    assert different == {k for k in before if k.endswith(ends)}
    assert (out / "report" / "report.html").is_file()
    assert run("verify", out) == 0
    card = (out / "single" / "README.md").read_text()
    assert f"Made by {method.upper()} in closed form" in card


def test_the_same_again_from_what_the_folder_holds(tmp_path, capsys):
    file, base = one_file("sd1", tmp_path)
    out, again = tmp_path / "one", tmp_path / "two"
    assert run("forget", file, *REQUEST, "-o", out, "--architecture", base, *SMALL) == 0
    assert run("forget", "--config", out / "run.yaml", "-o", again) == 0
    one, two = tensors(out / "single/one.safetensors"), tensors(again / "single/two.safetensors")
    assert all(torch.equal(one[k], two[k]) for k in one)
    capsys.readouterr()
    assert run("forget", "--config", out / "run.yaml") == 2  # a finished result stands
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "holds a run" in line
    assert run("verify", out) == 0


@pytest.mark.parametrize(("family", "kind"), [("sd1", "kohya"), ("sdxl", "lora")])
def test_a_lora_out_draws_what_was_trained(family, kind, tmp_path):
    file, base = one_file(family, tmp_path)
    out = tmp_path / "out"
    options = ["--train_modules", "lora", "--rank", "2", "--lora_alpha", "6", "--save_as", kind]
    argv = [file, *REQUEST, "-o", out, "--architecture", base, *options, *SMALL]
    assert run("forget", *argv) == 0
    assert list((out / kind).glob("*.safetensors"))
    args = Forget(
        pretrained_model_name_or_path=str(file),
        forget=["cat"],
        output_dir=out,
        architecture=base,
        train_modules="lora",
        save_as=kind,
    ).resolved()
    there = draw(pictures.after(args))
    assert not torch.equal(there, draw(open_single(file, config=base)))
    assert evidence.verify(out) == []


@pytest.mark.slow
def test_two_processes(tmp_path):
    file, base = one_file("sd1", tmp_path)
    out = tmp_path / "out"
    more = [
        "--mixed_precision",
        "bf16",
        "--train_modules",
        "lora",
        "--gradient_checkpointing",
        "--gradient_accumulation_steps",
        "2",
        "--save_as",
        "single",
    ]
    argv = ["forget", file, *REQUEST, "-o", out, "--architecture", base, *SMALL, *more]
    path = f"{Path(__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "ebu_optim",
            *map(str, argv),
        ],
        capture_output=True,
        text=True,
        env=env,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    before, after = tensors(file), tensors(out / "single" / "out.safetensors")
    assert any(not torch.equal(before[k], after[k]) for k in before)
    assert evidence.verify(out) == []


def test_a_folder_gives_a_folder_or_a_file(tmp_path):
    base = folder("sd1", tmp_path / "base")
    assert run("forget", base, *REQUEST, "-o", tmp_path / "a", *SMALL) == 0
    assert run("forget", base, *REQUEST, "-o", tmp_path / "b", "--save_as", "single", *SMALL) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "a" / "pipeline")
    file = open_single(tmp_path / "b" / "single" / "b.safetensors", config=base)
    assert torch.equal(draw(pipe), draw(file))


def test_the_call_takes_a_pipeline_and_returns_one(tmp_path):
    base = folder("sd1", tmp_path / "base")
    pipe = StableDiffusionPipeline.from_pretrained(base)
    found = ebu_optim.forget(
        pipe,
        "cat",
        instead="car",
        keep=["a red car"],
        output_dir=tmp_path / "out",
        surrogate_images=2,
        replay_images=2,
        forget_images=2,
        num_inference_steps=2,
        max_train_steps=2,
        evidence_images=1,
        evidence_prompts=1,
        clip_weights="none",
        cpu=True,
    )
    assert found is not None
    assert found.figures["change, target"]["value"] > 0
    assert not torch.equal(draw(found.pipeline), draw(pipe))
    with pytest.raises(InputError, match="model must be a file"):
        ebu_optim.forget(3, "cat", output_dir=tmp_path / "x")
    with pytest.raises(InputError, match=r"--method must be one of ebu, .*; got jont"):
        ebu_optim.forget("model", "cat", output_dir=tmp_path / "x", method="jont")


def test_a_plan_reads_no_weights_and_writes_nothing(tmp_path, capsys, monkeypatch):
    file, base = one_file("sd1", tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("ebu_optim.formats.opening.read", refuse)
    out = tmp_path / "out"
    argv = [file, *REQUEST, "-o", out, "--architecture", base, "--plan", "--esd_eta", "2"]
    assert run("forget", *argv) == 0
    said = capsys.readouterr().out
    for part in (
        "memory by phase",
        "trained: full",
        "passes",
        "single",
        "without effect on this run: --esd_eta",
        "evidence.json",
    ):
        assert part in said
    assert not out.exists()
    assert "about 2,000 forward and backward in 1,000 steps" in said
    assert run("forget", *argv, "--adversary_steps", 3, "--adversaries", 2) == 0
    # the two losses, the forget loss at both, and three attacks of each
    assert "about 10,000 forward and backward in 1,000 steps" in capsys.readouterr().out
    # the two losses, three steps of relearning, and the forget loss after them
    assert run("forget", *argv, "--relearner_steps", 3) == 0
    assert "about 6,000 forward and backward in 1,000 steps" in capsys.readouterr().out
    more = ["--method", "fine_tune", "--remember_loss", "crossed", "--replay_images", "1"]
    assert run("forget", *argv[:-2], *more) == 0
    said = capsys.readouterr().out
    assert "warning: FT with --remember_loss crossed learns nothing" in said
    assert "warning: --replay_images 1: only as many of the 2 prompts are replayed" in said


def test_what_was_changed_since_is_told(tmp_path, capsys):
    base = folder("sd1", tmp_path / "base")
    out = tmp_path / "out"
    assert run("forget", base, *REQUEST, "-o", out, *SMALL) == 0
    (out / "report" / "results.md").write_text("better")
    (out / "pipeline" / "new.txt").write_text("x")
    (out / "pipeline" / "README.md").unlink()
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.5}))
    capsys.readouterr()
    assert run("verify", out) == 1
    assert capsys.readouterr().out.splitlines() == [
        "pipeline/README.md: is missing",
        "report/results.md: was changed",
        "pipeline/new.txt: was added",
        f"base: the scheduler of {base} is a different one",
    ]
    (out / "evidence.json").write_text("{}")
    assert run("verify", out) == 2


def test_the_report_has_the_attacks_of_a_judge(tmp_path, capsys):
    pytest.importorskip("open_clip", reason="open_clip comes with the extra text_to_image")
    from .clip import NAME, random_weights

    weights = random_weights(tmp_path / "clip.pt")
    file, base = one_file("sd1", tmp_path)
    out = tmp_path / "out"
    judge = [
        "--judge",
        "clip",
        "--clip_model",
        NAME,
        "--clip_weights",
        weights,
        "--clip_against",
        "a car",
        "--attack_images",
        "2",
        "--attacks",
        "relearn",
        "paraphrase",
        "--paraphrases",
        "a red cat",
    ]
    small = [w for w in SMALL if w not in ("--clip_weights", "none")]
    argv = [file, *REQUEST, "-o", out, "--architecture", base, *small, *judge]
    assert run("forget", *argv) == 0
    rows = json.loads((out / "report" / "results.json").read_text())["rows"]
    before, after = (row["values"] for row in rows)
    assert 0 < before["p_f"]["value"] < 1
    assert {"p_f", "paraphrase", "relearn_steps", "CLIP score, target"} <= after.keys()
    assert evidence.verify(out) == []
    kohya = ["--train_modules", "lora", "--save_as", "kohya"]
    assert run("forget", *argv[: -len(judge)], *judge, *kohya) == 2
    assert "use --save_as lora, which saves the same weights" in capsys.readouterr().err


def test_signed_evidence_says_whose_it_is(tmp_path, capsys):
    pytest.importorskip("model_signing", reason="model-signing comes with the extra sign")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def key(name: str) -> tuple[Path, Path]:
        made = ec.generate_private_key(ec.SECP256R1())
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        private.write_bytes(
            made.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        public.write_bytes(
            made.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        return private, public

    (private, public), (_, other) = key("ours"), key("other")
    base, out = folder("sd1", tmp_path / "base"), tmp_path / "out"
    assert run("forget", base, *REQUEST, "-o", out, "--sign_key", private, *SMALL) == 0
    assert run("verify", out, "--public_key", public) == 0
    assert run("verify", out, "--public_key", other) == 1
    said = json.loads((out / "evidence.json").read_text())
    (out / "evidence.json").write_text(json.dumps({**said, "forget": ["dog"]}))
    capsys.readouterr()
    assert run("verify", out, "--public_key", public) == 1
    assert "evidence.sig" in capsys.readouterr().out


def test_classes_by_the_same_command(tmp_path, capsys):
    from ebu_optim.class_conditional import models

    info = {
        "classes": ["a", "b", "c", "d"],
        "shape": [1, 8, 8],
        "source": "tiny",
        "null_class": 4,
    }
    base, out = tmp_path / "base", tmp_path / "out"
    models.save_unet(base, tiny_unet(), schedule(), info, "card")
    options = [
        "--replay_per_class",
        "2",
        "--sampling_steps",
        "2",
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--cpu",
    ]
    assert run("forget", base, "b", "-o", out, *options, "--plan") == 0
    assert "4 classes" in capsys.readouterr().out
    assert run("forget", base, "b", "-o", out, *options) == 0
    assert (out / "unet" / "config.json").is_file()
    assert run("verify", out) == 0
    assert run("forget", base, "x", "-o", tmp_path / "no", *options) == 2
    capsys.readouterr()
    assert run("forget", base, "b", "-o", tmp_path / "no", "--method", "uce") == 2
    assert "--method uce: it edits how cross attention reads text" in capsys.readouterr().err
    with pytest.raises(InputError, match="--method uce: it edits how cross attention reads"):
        ForgetClasses(
            pretrained_model_name_or_path=str(base), forget=["b"], output_dir=out, method="uce"
        )


def test_classes_are_relabelled_on_real_images(tmp_path, capsys):
    """The sets are made of what the request says: its data, the images of its surrogate."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from ebu_optim.class_conditional import models

    info = {
        "classes": list("0123456789"),
        "shape": [1, 8, 8],
        "source": "tiny",
        "null_class": 10,
    }
    base, out = tmp_path / "base", tmp_path / "out"
    models.save_unet(base, tiny_unet(11), schedule(), info, "card")
    options = [
        "--replay_per_class",
        "2",
        "--sampling_steps",
        "2",
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--cpu",
    ]
    relabel = ["--forget_loss", "relabel"]
    assert run("forget", base, "1", "-o", out, *options, *relabel) == 2
    assert "relabel needs real images: give --digits, --dataset_name" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    assert run("forget", base, "1", "-o", out, *options, *relabel, "--digits") == 0
    assert (tmp_path / "out_sets" / "forget.safetensors").is_file()
    null = ["--surrogate", "null_class"]
    assert run("forget", base, "1", "-o", tmp_path / "null", *options, *null) == 0


def test_classes_are_measured_by_a_classifier(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from ebu_optim.class_conditional import models
    from ebu_optim.class_conditional.options import TrainClassifier
    from ebu_optim.class_conditional.train_classifier import train_classifier

    info = {
        "classes": list("0123456789"),
        "shape": [1, 8, 8],
        "source": "tiny",
        "null_class": 10,
    }
    base, out, judge = tmp_path / "base", tmp_path / "out", tmp_path / "judge"
    models.save_unet(base, tiny_unet(11), schedule(), info, "card")
    train_classifier(
        TrainClassifier(
            digits=True,
            model="small",
            output_dir=judge,
            max_train_steps=2,
            train_batch_size=8,
            cpu=True,
        )
    )
    options = [
        "--replay_per_class",
        "2",
        "--sampling_steps",
        "2",
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "2",
        "--validation_images",
        "1",
        "--validation_steps",
        "2",
        "--validation_inference_steps",
        "2",
        "--cpu",
        "--classifier",
        judge,
    ]
    assert run("forget", base, "1", "-o", out, *options) == 2
    assert "--classifier needs real images: give --digits" in capsys.readouterr().err
    assert run("forget", base, "1", "-o", out, *options, "--digits") == 0
    assert run("show", out) == 0
    assert run("verify", out) == 0


def test_presets_are_what_they_say():
    given = {"pretrained_model_name_or_path": "m", "forget": ["cat"], "output_dir": Path("o")}
    args = Forget(**given).resolved()
    for name, value in PRESETS["recommended"].items():
        assert getattr(args, name) == value
    paper = Forget(**given, preset="paper").resolved()
    assert (paper.train_modules, paper.forget_loss, paper.remember, paper.gamma) == (
        "xattn",
        None,
        "replay",
        None,
    )
    assert Forget(**given, gamma=3.0, train_modules="xattn").resolved().gamma == 3.0
    for method in ("fine_tune", "mgda"):
        assert Forget(**given, method=method).resolved().remember == "replay"
    esd = Forget(**given, method="esd").resolved()
    assert (esd.forget_loss, esd.train_modules, esd.gamma) == (None, "xattn", None)
    uce = Forget(**given, method="uce").resolved()
    assert (uce.forget_loss, uce.train_modules, uce.gamma) == (None, None, None)
    assert uce.resolved() is uce
    assert save.FOLDERS  # the table of results


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing"], "no command 'nothing'"),
        (["forget"], "required: MODEL, CONCEPT, --output_dir"),
        (["forget", "m", "-o", "o"], "required: CONCEPT"),
        (["forget", "m", "cat"], "required: --output_dir"),
        (["forget", "m.ckpt", "cat", "-o", "o"], "m.ckpt"),
        (["forget", "m", "cat", "-o", "o", "--as", "cat", "--plan"], "m is not a local folder"),
        (["forget", "m", "cat", "-o", "o", "--vae", "v.safetensors"], "--vae v.safetensors"),
        (["forget", "m", "cat", "-o", "o", "--save_as", "kohya"], "--save_as kohya"),
        (["forget", "m", "cat", "-o", "o", "--sign_key", "k.pem"], "--sign_key k.pem"),
        (["verify", "o"], "o has no complete evidence.json"),
        (["show", "o"], "o holds no report"),
    ],
)
def test_bad_input_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m.ckpt").write_bytes(b"\x80\x02")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(*argv) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert len(lines) == 1
    assert said in lines[0]
    assert not Path("o").exists()


def test_help_names_every_command(capsys):
    cli.main([])
    said = capsys.readouterr().out
    assert all(f"ebu {name}" in said for name in cli.COMMANDS)
    assert run("--version") == 0
    assert run("doctor", "--no_memory") == 0
    assert "kernels for the CPU" in capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "ebu_optim", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ebu_optim ")


def test_what_fits_is_read_from_the_counts():
    lines = fitting.table(room=80 * fitting.GIB)
    (line,) = [line for line in lines if "Stable Diffusion 1.x, cross attention, fp16" in line]
    assert line.endswith("fits")
    assert 5 < float(line.split(": ")[1].split()[0]) < 16
    (line,) = [
        line
        for line in fitting.table(room=None)
        if "Stable Diffusion 1.x, cross attention, fp16" in line
    ]
    assert line.endswith("  on 12 GB")


@pytest.mark.parametrize(
    "what",
    ["Stable Diffusion 1.x, cross attention, fp16", "Stable Diffusion 3.5 medium, LoRA, fp16"],
)
def test_shipped_counts_are_those_of_today(what):
    shipped, cases = json.loads(fitting.FILE.read_text()), dict(counting.cases())
    assert set(cases) <= set(shipped), "python -m ebu_optim.takedown.counting"
    if what not in cases:
        pytest.skip("this diffusers has no such pipeline")
    assert cases[what]() == pytest.approx(shipped[what], rel=0.01)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Stable Diffusion 3.5 medium", 2.243),
        ("Stable Diffusion 3.5 large", 8.057),
        ("FLUX.1 dev", 11.901),
        ("FLUX.2 klein 4B", 3.876),
        ("FLUX.2 klein 9B", 9.079),
        ("Z-Image", 6.155),
        ("PixArt-Sigma XL 1024", 0.611),
        ("Sana 1600M", 1.604),
        ("Qwen-Image", 20.430),
    ],
)
def test_released_transformers_have_their_sizes(name, billions):
    from ebu_optim.takedown import released

    if (looked := released.looked(name)) is None:
        pytest.skip("this diffusers has no such pipeline")
    with torch.device("meta"):
        denoiser = looked.family.kind("transformer").from_config(looked.unet)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)
    assert looked.resolution == 1024
