"""The main job as a user runs it, shortened: what it writes, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "quickstart.py"


def command(*args: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *args]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "out"
    done = run("--forget", "7", "--steps", "3", "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert "forgotten" in done.stdout
    assert "deep" in done.stdout
    return out


def test_writes_the_model_pictures_numbers_and_card(result):
    names = {p.name for p in result.iterdir()}
    assert names == {
        "README.md", "before_after.png", "curves.png", "metrics.json", "model",
        "replay.safetensors",
    }  # fmt: skip
    for picture in ("before_after.png", "curves.png"):
        assert (result / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    card = (result / "README.md").read_text()
    assert "# Digits without 7" in card
    assert "P of the forgotten digit" in card


def test_metrics_have_the_three_axes_the_limits_and_the_protocol(result):
    metrics = json.loads((result / "metrics.json").read_text())
    for part in ("before", "after"):
        assert {"ce_f", "ce_r", "p_f", "ra"} <= set(metrics[part])
        assert 0 <= metrics[part]["p_f"] <= 1
    assert metrics["before"]["p_f"] > 0.9
    assert metrics["before"]["ra"] > 0.95
    assert {"inversion_100", "relearn_10"} <= set(metrics["after"])
    assert metrics["noise"]["p_f"] < 0.01  # the reject class knows noise
    assert metrics["noise"]["p_f_ten_classes"] > 0.1  # the ten-class one calls it a seven
    assert metrics["protocol"]["forget"] == 7
    assert metrics["protocol"]["alpha"] == 0.6
    assert metrics["protocol"]["base_model"]
    assert metrics["seeds"]["unlearning"] == 0
    assert metrics["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in metrics["curve"]] == [0, 3]
    assert "overlap_lift" in metrics["curve"][-1]


def test_model_loads_with_diffusers_and_is_another_one(result):
    model = UNet2DModel.from_pretrained(result / "model")
    base = UNet2DModel.from_pretrained(ROOT / "examples/assets/digits/unet")
    assert model.dtype == torch.float32
    changed = [
        not torch.equal(a, b.float())
        for a, b in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2


def test_a_finished_result_is_not_overwritten_unasked(result):
    before = (result / "metrics.json").read_bytes()
    done = run("--output_dir", str(result), "--steps", "1")
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    assert (result / "metrics.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--forget", "10"], "0..9"),
        (["--forget", "zero"], "invalid int"),
        (["--steps", "0"], ">= 1"),
        (["--alpha", "2"], "--alpha must be in [0, 1]; got 2.0"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_arguments_are_named(args, message):
    done = run(*args)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "metrics.json").write_text('{"loss": 1}')
    done = run("--output_dir", str(tmp_path), "--overwrite")
    assert done.returncode == 2
    assert "something else" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["replay.safetensors", "before_after.png", "model"])
def test_killed_at_any_moment_leaves_a_whole_result_or_none(tmp_path, moment):
    """SIGKILL when `moment` appears: the old result is untouched or there is none; the next start
    goes through without being told to overwrite."""
    out, work = tmp_path / "out", tmp_path / ".out.partial"
    process = subprocess.Popen(
        command("--steps", "1", "--output_dir", str(out)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (work / moment).exists():
            break
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if out.exists():  # it was quicker than the signal: then it is whole
        assert json.loads((out / "metrics.json").read_text())["after"]
        return
    assert work.exists()
    if moment == "model":  # once is enough, the rest is the same
        done = run("--steps", "1", "--output_dir", str(out))
        assert done.returncode == 0, done.stderr
        assert json.loads((out / "metrics.json").read_text())["after"]
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_training_replaces_the_shipped_folder_when_all_is_made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import digits

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

    files = list((ROOT / "examples/assets").rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) < 3_000_000
    for file in files:
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            assert {f.get_tensor(n).dtype for n in names} == {torch.float16}
