"""The fused kernels for CUDA: their tests in Triton's interpreter, and what happens without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (torch brings it with its CUDA builds for Linux)",
)


def interpreter_fails():
    """Why this Triton's interpreter cannot run the kernels, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = tuple(int(n) for n in metadata.version("triton").split(".")[:2])
    if version < (3, 2):
        return "the interpreter of Triton 3.0 and 3.1 makes no tensors in called functions"
    if version < (3, 7) and tuple(int(n) for n in np.__version__.split(".")[:2]) >= (2, 4):
        return "the interpreter of Triton before 3.7 needs NumPy before 2.4"
    return ""


interpreter = pytest.mark.skipif(bool(interpreter_fails()), reason=interpreter_fails())


def run(*args, **environment):
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@interpreter
def test_kernels_in_the_interpreter():
    """tests/interpreted, in a process where nothing has imported Triton yet."""
    # "values1" are tests of the reference's chunk sizes, which the kernels do not know
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not values1",
        "tests/interpreted",
        TRITON_INTERPRET="1",
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreter
def test_benchmark_for_machines_with_a_gpu_runs_dry(tmp_path):
    found = tmp_path / "gpu.json"
    args = ("tests/benchmarks/gpu.py", "--dry-run", "--json", str(found))
    done = run(*args, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(found.read_text())
    parts = {"exact", "select", "bandwidth", "small", "loop", "distributed", "sanitizer", "memory"}
    assert set(result) == {"machine", "rounds"} | parts
    assert result["machine"]["card"].startswith("none")
    assert {row["kind"] for row in result["exact"]} == {"normal", "nan"}
    for row in (*result["select"], *result["bandwidth"]):
        assert all(isinstance(s, float) for s in row["seconds"].values()), row
    assert [row["fused"] for row in result["loop"]] == [True, False]
    assert all(row["counted bytes"] > 8 * row["scalars"] for row in result["loop"])
    assert [row["wrapped by"] for row in result["distributed"]] == ["DDP", "FSDP2"]
    assert all(row.get("equal") or row["skipped"] for row in result["distributed"])
    assert [row["clean"] for row in result["sanitizer"]] == [True], result["sanitizer"]
    for row in result["memory"]:
        assert row.get("skipped") or row["counted"] > 0, row


@triton
def test_benchmark_without_a_gpu_says_how_to_try_it():
    done = run("tests/benchmarks/gpu.py", "--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "TRITON_INTERPRET=1" in done.stderr


AVAILABLE = "from ebu_optim.kernels import triton; print(triton.available())"


@triton
def test_interpreter_asked_for_too_late_is_a_reason_in_words():
    late = "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; " + AVAILABLE
    done = run("-c", late, TRITON_INTERPRET="0")
    assert "after Triton had been imported" in done.stdout, done.stderr


def test_without_triton_the_reason_names_it():
    done = run("-c", "import sys; sys.modules['triton'] = None; " + AVAILABLE)
    assert "Triton is not installed" in done.stdout, done.stderr


@triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_reason_says_so_and_the_package_does_not_import_triton():
    done = run("-c", AVAILABLE, TRITON_INTERPRET="0")
    assert "no CUDA device" in done.stdout, done.stderr
    code = "import ebu_optim, sys; print('triton' in sys.modules)"
    assert run("-c", code, TRITON_INTERPRET="0").stdout.strip() == "False"
