"""What `ebu forget` refuses: a line that names argument, value and remedy, before time is spent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers comes with the extra text_to_image")

from ebu_optim import cli
from ebu_optim.formats import write_folder, write_lora

from .single_files import folder, resaved, tensors
from .test_takedown import REQUEST, SMALL, run

GIB = 2**30


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model as a file, its folder, and a LoRA of another model."""
    place = tmp_path_factory.mktemp("models")
    found = {}
    for family in ("sd1", "sdxl"):
        base = folder(family, place / family)
        found[family] = write_folder(base, {}, place / f"{family}.safetensors"), base
    halves = {"lora_A": torch.ones(2, 5), "lora_B": torch.ones(7, 2)}
    layers = {
        f"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.{n}.weight": t
        for n, t in halves.items()
    }
    found["lora"] = write_lora({"unet": layers}, place / "lora.safetensors", alpha=2.0)
    return found


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, fresh_accelerate):
    monkeypatch.setenv("EBU_OPTIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def refused(monkeypatch, capsys, made):
    """Check that an `ebu forget` ends in one line with all these words, with nothing made."""
    file, base = made["sd1"]

    def check(*said: str, model=file, ask=REQUEST, more=(), out="out"):
        before = sorted(Path().rglob("*"))
        monkeypatch.setattr("ebu_optim.text_to_image.sets.make", None)  # where time is spent
        own = ["--architecture", base] if Path(model).is_file() else []
        capsys.readouterr()
        assert run("forget", model, *ask, "-o", out, *own, *SMALL, *more) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [x for x in lines if "error" in x.lower()]
        assert line.startswith("ebu forget: error: ")
        assert [w for w in said if w not in line] == [], line
        assert sorted(Path().rglob("*")) == before

    return check


def test_what_is_no_model(made, refused, tmp_path):
    file, _ = made["sd1"]
    text, cut = tmp_path / "notes.safetensors", tmp_path / "cut.safetensors"
    text.write_text("remember the milk, and the eggs")
    cut.write_bytes(file.read_bytes()[:-5])
    refused(str(text), "is not a complete safetensors file", "get it again", model=text)
    refused(str(cut), "is not a complete safetensors file", "get it again", model=cut)
    refused(str(made["lora"]), "is a LoRA, not a model", model=made["lora"])
    other = resaved(file, tmp_path / "other.safetensors", rename=lambda n: f"joint_blocks.{n}")
    refused(str(other), "is not a supported model", "are supported", model=other)
    last = max(n for n in tensors(file) if n.startswith("model.diffusion_model."))
    less = resaved(file, tmp_path / "less.safetensors", drop=lambda n: n == last)
    refused(str(less), last.rpartition(".")[2], model=less)
    more = resaved(
        file,
        tmp_path / "more.safetensors",
        add={"model.diffusion_model.extra.weight": torch.ones(1)},
    )
    refused(str(more), "extra.weight", model=more)
    refused(str(tmp_path), "is not a diffusers pipeline", "model_index.json", model=tmp_path)
    result = tmp_path / "without" / "single" / "without.safetensors"
    result.parent.mkdir(parents=True)
    result.touch()
    for model in (result.parent, result.parent.parent):
        refused(f"missing in {model}: give {result}, which is in it", model=model)


def test_a_lora_of_another_base(made, refused, tmp_path):
    refused(str(made["lora"]), "is not a LoRA for this", more=["--lora", made["lora"]])
    refused(str(made["sd1"][0]), "is not a LoRA", more=["--lora", made["sd1"][0]])


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (["a cat " * 20], ["CONCEPT", "tokens", "takes 12", "shorten it"]),
        (["cat", "--as", "a dog " * 20], ["--as", "tokens", "shorten it"]),
        (["cat", "--keep", "a dog " * 20], ["--keep", "tokens", "shorten it"]),
        (
            ["cat", "--keep", "a dog", "--as", "cat"],
            ["--as", "is also a prompt to forget", "remove it"],
        ),
        (["cat", "--keep", "a dog", "--as", "CAT"], ["--as", "CAT", "is also a prompt to forget"]),
        (["cat", "--keep", "a dog", "a photo of Cat"], ["--keep 'a photo of Cat'", "remove it"]),
        ([""], ["CONCEPT", "the empty prompt"]),
        (["cat", "--keep", "none.txt"], ["--keep none.txt cannot be read"]),
        (["cat", "--gamma", "much"], ["--gamma", "much"]),
        (["cat", "--save_as", "zip"], ["--save_as", "zip", "kohya"]),
    ],
)
def test_prompts_and_values(ask, said, refused):
    refused(*said, ask=ask)


def test_an_output_folder_that_is_in_use(refused, monkeypatch):
    Path("file").write_text("x")
    Path("theirs").mkdir()
    Path("theirs/thesis.txt").write_text("x")
    refused("--output_dir theirs is in use by something else", "another folder", out="theirs")
    refused("--output_dir file is in use by something else", out="file")
    refused("--output_dir file/out", "is a file: give another folder", out="file/out")
    Path("theirs/thesis.txt").unlink()
    for more in (["--plan"], []):
        Path("theirs/run.json").write_text(json.dumps({"script": "unlearn_text_to_image"}))
        Path("theirs/checkpoints").mkdir(exist_ok=True)
        refused("theirs holds a run", "--resume_from_checkpoint latest", out="theirs", more=more)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, how: False)
        refused("--output_dir new/out", "cannot write to", "another folder", out="new/out")


def test_another_process_writes_there(refused):
    import fcntl

    Path("out").mkdir()
    with open("out/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Path("out/run.json").write_text(json.dumps({"script": "unlearn_text_to_image"}))
        refused("out is being written by another process", "wait for it")


def test_a_card_that_is_too_small(made, refused, monkeypatch):
    free = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GIB))
    small = [w for w in SMALL if w != "--cpu"]
    monkeypatch.setattr("tests.test_takedown_refused.SMALL", small)
    refused("needs", "cuda:0", "0.0 GiB free", "no other options fit", "--cpu")
    from ebu_optim.text_to_image import memory

    count = memory.count

    def larger(args, looked, texts):
        """Of the size of Stable Diffusion: the whole denoiser takes 20 times as much."""
        cost = count(args, looked, texts)
        size = {"full": 26, "xattn": 5, "lora": 3}[args.train_modules] * GIB
        return cost._replace(phases={"unlearning": {"trained weights": size}})

    monkeypatch.setattr(memory, "count", larger)
    free[0] = 8 * GIB
    refused(
        "needs 26.0 GiB of cuda:0, which has 8.0 GiB free",
        "give --train_modules xattn --mixed_precision fp16 --gradient_checkpointing",
        "needs 5.0 GiB",
    )
    free[0] = 4 * GIB
    refused("give --train_modules lora", "needs 3.0 GiB")

    def drawing(args, looked, texts):
        """What is too large is the report's pictures."""
        size = args.sample_batch_size * 2 * GIB if args.evidence_images else GIB
        return count(args, looked, texts)._replace(phases={"report": {"VAE": size}})

    monkeypatch.setattr(memory, "count", drawing)
    refused("needs 8.0 GiB", "give --sample_batch_size 1, which needs 2.0 GiB")
    free[0] = GIB
    refused("give --sample_batch_size 1 --evidence_images 0, which needs 1.0 GiB")


def test_the_hub_says_no(refused, monkeypatch):
    import huggingface_hub

    from .stable_diffusion.script import hub_error

    for error, said in (
        (
            ConnectionError("no route"),
            ["a/b", "not a local folder", "Without a network give a folder"],
        ),
        (hub_error("GatedRepoError"), ["a/b is gated", "licence", "auth login"]),
        (hub_error("RepositoryNotFoundError"), ["a/b is neither a folder", "check the name"]),
        (hub_error("RevisionNotFoundError"), ["a/b has no --revision gone"]),
    ):

        def fail(*_, _error=error, **__):
            raise _error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        refused(*said, model="a/b", more=["--revision", "gone"])


def test_a_key_that_cannot_sign(refused, tmp_path):
    pytest.importorskip("model_signing", reason="model-signing comes with the extra sign")
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = ec.generate_private_key(ec.SECP256R1())
    plain = (to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
    secret = (to.Encoding.PEM, to.PrivateFormat.PKCS8, to.BestAvailableEncryption(b"x"))
    for name, content in {
        "public": key.public_key().public_bytes(
            to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo
        ),
        "rubbish": b"key",
        "with_password": key.private_bytes(*secret),
        "rsa": rsa.generate_private_key(65537, 2048).private_bytes(*plain),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        refused(
            f"--sign_key {path}",
            "must be an elliptic-curve private key",
            "openssl",
            more=["--sign_key", path],
        )
    (tmp_path / "good").write_bytes(key.private_bytes(*plain))
    path = tmp_path / "rubbish"
    refused(
        f"--sign_certificate {path}",
        more=["--sign_key", tmp_path / "good", "--sign_certificate", path],
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_train_steps: many", ["--max_train_steps", "many"]),
        ("save_as: zip", ["--save_as", "zip"]),
        ("cpu: perhaps", ["run.yaml: cpu must be true or false", "perhaps"]),
        ("max_train_step: 3", ["run.yaml: there is no option", "did you mean max_train_steps?"]),
        ("forget: {a: 1}", ["run.yaml: forget must be a list", "{'a': 1}"]),
        ("forget: cat", ["run.yaml: forget must be a list", "'cat'"]),
        ("keep: 3", ["run.yaml: keep must be a list", "got 3"]),
        ("[1, 2]", ["run.yaml"]),
        ("a: [", ["run.yaml"]),
        (None, ["run.yaml"]),
    ],
)
def test_a_file_of_options_that_is_wrong(text, said, made, capsys):
    file, _ = made["sd1"]
    if text is not None:
        Path("run.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["forget", str(file), "cat", "-o", "out", "--config", "run.yaml"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ebu forget: error: ")
    assert [w for w in said if w not in line] == [], line
    assert not Path("out").exists()


def poisoned(base: Path, to: Path, part: str, end: str, value: float) -> Path:
    """The folder with a value in place of a tensor of a part."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, to)
    (file,) = (to / part).glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in state if n.endswith(end))
    save_file({**state, name: torch.full_like(state[name], value)}, file, {"format": "pt"})
    return to


def test_pictures_that_are_nan(made, tmp_path, capsys):
    """A VAE that overflows, as some do in float16: the pictures are of no use, and it is said."""
    _, base = made["sd1"]
    bad = poisoned(base, tmp_path / "bad", "vae", "decoder.conv_out.bias", float("nan"))
    assert run("forget", bad, *REQUEST, "-o", "out", *SMALL) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert "NaN" in line
    assert not Path("out/evidence.json").exists()


def test_a_model_that_draws_nan_or_diverges(made, tmp_path, capsys):
    _, base = made["sd1"]
    bad = poisoned(base, tmp_path / "bad", "unet", "conv_out.bias", float("inf"))
    assert run("forget", bad, *REQUEST, "-o", "out", *SMALL) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert "NaN or Inf" in line
    rate = ["--learning_rate", "1e30", "--max_train_steps", "9"]
    assert run("forget", base, *REQUEST, "-o", "fast", *SMALL, *rate) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert "--learning_rate" in line
    assert not Path("fast/evidence.json").exists()


PLACES = {
    "sets": "ebu_optim.diffusion.sampling.sample",
    "training": "ebu_optim.training.unlearning.unlearning_step",
    "report": "ebu_optim.takedown.pictures.measure",
    "evidence": "ebu_optim.takedown.evidence.write",
}


STEPWISE = [*SMALL, "--checkpointing_steps", "1"]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The folder of a run that nothing interrupts."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBU_OPTIM_CACHE", str(place / "cache"))
        file, base = made["sd1"]
        argv = [file, *REQUEST, "--architecture", base, *STEPWISE, "-o", place / "one"]
        assert run("forget", *argv) == 0
    return place


@pytest.mark.parametrize("moment", PLACES)
def test_interrupted_at_any_time_it_goes_on_to_the_same_bytes(
    moment, whole, made, tmp_path, capsys
):
    (file, base), out = made["sd1"], tmp_path / "one"
    argv = ["forget", file, *REQUEST, "--architecture", base, *STEPWISE, "-o", out]
    times, real = iter(range(9)), attribute(PLACES[moment])

    def stop(*args, **options):
        if next(times) == (moment == "training"):  # after a step
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLACES[moment], stop)
        capsys.readouterr()
        assert run(*argv) == 130
    said = capsys.readouterr().err
    assert "the same command with --resume_from_checkpoint latest continues" in said
    assert run("verify", out) == 2
    assert run(*argv, "--resume_from_checkpoint", "latest") == 0
    for name in ("single/one.safetensors", "report/pictures/0_target_after.png", "run.yaml"):
        one, two = (Path(p, "one", name).read_bytes() for p in (whole, tmp_path))
        assert one.replace(str(whole).encode(), str(tmp_path).encode()) == two, name
    assert run("verify", out) == 0


def attribute(path: str):
    from importlib import import_module

    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_a_real_signal(made, tmp_path):
    if os.name == "nt":
        pytest.skip("which has no SIGSTOP")
    from .stopping import signalled

    file, base = made["sd1"]
    script = tmp_path / "ebu.py"
    script.write_text("from ebu_optim.cli import main\n\nmain()\n")
    out = tmp_path / "out"
    code, said = signalled(
        signal.SIGINT,
        out / "run.json",
        script,
        "forget",
        file,
        *REQUEST,
        "-o",
        out,
        "--architecture",
        base,
        *SMALL,
    )
    assert code == 130
    assert said.splitlines()[-1] == (
        "interrupted; the same command with --resume_from_checkpoint latest continues"
    )


def test_prompts_from_windows(made):
    file, base = made["sd1"]
    Path("gone.txt").write_bytes("\ufeffcat\r\n\r\n# comment\r\n".encode())
    Path("stay.txt").write_bytes("\ufeffa red car\r\na dog\r\n".encode())
    ask = ["gone.txt", "--as", "car", "--keep", "stay.txt"]
    assert run("forget", file, *ask, "-o", "out", "--architecture", base, *SMALL) == 0
    said = json.loads(Path("out/unlearn.json").read_text())
    assert said["forget"] == ["an image of cat", "a photo of cat", "cat"]
    assert said["remember"] == ["a red car", "a dog"]


@pytest.mark.parametrize(
    ("name", "number", "remedy"),
    [
        ("checkpoints", errno.ENOSPC, "free some space"),
        ("single", errno.EACCES, "this user may write"),
        ("evidence.json", errno.EROFS, "this user may write"),
        ("run.yaml", errno.ENOSPC, "free some space"),
    ],
)
def test_what_cannot_be_written(name, number, remedy, made, capsys, monkeypatch):
    file, base = made["sd1"]
    mkdir = Path.mkdir

    def full(self, *args, **options):
        if name in str(self.absolute()).partition("/here/")[2]:
            raise OSError(number, os.strerror(number), str(self))
        return mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    argv = ["forget", file, *REQUEST, "-o", "out", "--architecture", base, *SMALL]
    assert run(*argv) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert name in line
    assert remedy in line
    assert "--resume_from_checkpoint latest continues" in line
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert run(*argv, "--resume_from_checkpoint", "latest") == 0
    assert run("verify", "out") == 0
