"""The main job as a user runs it, shortened: what it writes, and what a killed one leaves."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from .processes import python
from .scripts import run_script
from .stopping import signalled

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "quickstart.py"
STEPS = 26  # one more than to the first checkpoint
OPTIONS = ("--forget", "7", "--steps", str(STEPS))


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return python(SCRIPT, *args)


def refused(*args: str) -> str:
    """What is said, in this process: it takes longer to import what a job needs than to refuse."""
    code, said = run_script(SCRIPT, *args)
    assert code == 2, said
    return said


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = run(*OPTIONS, "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert "forgotten" in done.stdout
    assert "deep" in done.stdout
    return out


def test_writes_the_model_pictures_numbers_and_card(result):
    names = {p.name for p in result.iterdir()}
    assert names == {
        "README.md",
        "before_after.png",
        "curves.png",
        "metrics.json",
        "model",
        "replay.safetensors",
    }
    for picture in ("before_after.png", "curves.png"):
        assert (result / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    card = (result / "README.md").read_text()
    assert "# Digits without 7" in card
    assert "P of the forgotten digit" in card


def test_metrics_have_the_three_axes_the_limits_and_the_protocol(result):
    metrics = json.loads((result / "metrics.json").read_text())
    for part in ("before", "after"):
        assert {"ce_f", "ce_r", "p_f", "p_f_reject", "ra", "ra_reject", "ua_reject"} <= set(
            metrics[part]
        )
        assert 0 <= metrics[part]["p_f_reject"] <= 1
    assert metrics["before"]["p_f_reject"] > 0.9
    assert metrics["before"]["ra_reject"] > 0.95
    assert {"inversion_100", "relearn_10"} <= set(metrics["after"])
    assert metrics["noise"]["p_f_reject"] < 0.01  # the reject class knows noise
    assert metrics["noise"]["p_f"] > 0.1  # the ten-class one calls it a seven
    assert metrics["protocol"]["forget"] == 7
    assert metrics["protocol"]["becomes"] == "digit"
    assert metrics["before"]["p_next_reject"] < 0.01
    assert metrics["protocol"]["alpha"] == 0.6
    assert metrics["protocol"]["base_model"]
    assert metrics["seeds"]["unlearning"] == 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in metrics["curve"]] == [0, 25, STEPS]
    assert "overlap_lift" in metrics["curve"][-1]


def test_model_loads_with_diffusers_and_is_another_one(result):
    model = UNet2DModel.from_pretrained(result / "model")
    base = UNet2DModel.from_pretrained(ROOT / "ebu_optim/worlds/assets/digits/unet")
    assert model.dtype == torch.float32
    changed = [
        not torch.equal(a, b.float())
        for a, b in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2


def test_with_an_adversary_it_is_another_model(result, tmp_path):
    out = tmp_path / "out"
    code, said = run_script(
        SCRIPT, *OPTIONS, "--adversary_steps", "1", "--steps", "1", "--output_dir", str(out)
    )
    assert code == 0, said
    assert json.loads((out / "metrics.json").read_text())["protocol"]["adversary_steps"] == 1


def test_it_becomes_the_next_digit_or_noise(result, tmp_path):
    out = tmp_path / "out"
    code, said = run_script(SCRIPT, *OPTIONS, "--becomes", "noise", "--output_dir", str(out))
    assert code == 0, said
    found = {
        name: json.loads((folder / "metrics.json").read_text())
        for name, folder in {"digit": result, "noise": out}.items()
    }
    assert found["noise"]["protocol"]["becomes"] == "noise"
    assert "noise" in found["noise"]["protocol"]["forget_loss"]
    after = {name: of["after"] for name, of in found.items()}
    # after a few steps already
    assert after["digit"]["p_next_reject"] > 2 * after["noise"]["p_next_reject"]
    assert "Asked for 7, the model now generates noise." in (out / "README.md").read_text()


def test_a_finished_result_is_not_overwritten_unasked(result):
    before = (result / "metrics.json").read_bytes()
    assert "--overwrite" in refused("--output_dir", str(result), "--steps", "1")
    assert (result / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--forget", "10"], "0..9"),
        (["--forget", "zero"], "Expected int"),
        (["--steps", "0"], ">= 1"),
        (["--alpha", "2"], "--alpha must be in [0, 1]; got 2.0"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_arguments_are_named(args, message):
    assert message in refused(*args)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text('{"loss": 1}')
    assert "something else" in refused("--output_dir", str(tmp_path), "--overwrite")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_killed_and_interrupted_the_same_command_goes_on_to_the_same_result(result, tmp_path):
    """Interrupted in the unlearning, then killed when its results are written: there is no half
    result at any time, and in the end the one of an unbroken run."""
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    begun = []
    moments = {"run/step_00000025": signal.SIGINT, "before_after.png": signal.SIGKILL}
    for moment, how in moments.items():
        code, said = signalled(how, work / moment, SCRIPT, *OPTIONS, "--output_dir", out)
        assert code == (130 if how == signal.SIGINT else -how), said
        assert not out.exists()
        assert ("the same command continues" in said) == (how == signal.SIGINT)
        begun.append((work / "replay.safetensors").stat().st_ino)
    assert (work / "run" / "step_00000026").exists()
    done = run(*OPTIONS, "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert f"{STEPS}/{STEPS}" in done.stderr  # the bar starts where it was
    begun.append((out / "replay.safetensors").stat().st_ino)
    assert len(set(begun)) == 1  # not sampled again
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in out.iterdir()} == {p.name for p in result.iterdir()}

    a, b = (UNet2DModel.from_pretrained(f / "model").state_dict() for f in (out, result))
    assert all(torch.equal(a[k], b[k]) for k in b)
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (out, result))
    for metrics in (ours, theirs):
        for row in (metrics, *metrics["curve"]):
            del row["seconds"]
    assert ours == theirs


def test_training_replaces_the_shipped_folder_when_all_is_made(tmp_path, monkeypatch):
    from ebu_optim.worlds import digits

    digits.train(tmp_path / "digits", steps=2, epochs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]
    made = {str(p.relative_to(tmp_path / "digits")) for p in (tmp_path / "digits").rglob("*.*")}
    shipped = {str(p.relative_to(digits.ASSETS)) for p in digits.ASSETS.rglob("*.*")}
    assert made == shipped
    monkeypatch.setattr(digits, "ASSETS", tmp_path / "digits")
    digits.load_classifiers()
    assert digits.load_unet().config.num_class_embeds == 11


def test_shipped_weights_are_small_and_in_16_bits():
    from safetensors import safe_open

    files = list((ROOT / "ebu_optim/worlds/assets").rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 3_000_000
    for file in files:
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            assert {f.get_tensor(n).dtype for n in names} == {torch.float16}
