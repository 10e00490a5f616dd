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

from ebu_optim.kernels import _tables, reference

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
        [sys.executable, *args], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@interpreter
def test_kernels_in_the_interpreter():
    """`triton_cases.py`, in a process where nothing has imported Triton yet."""
    # "values1" are tests of the reference's chunk sizes, which the kernels do not know
    done = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not values1",
        "tests/triton_cases.py", TRITON_INTERPRET="1",
    )  # fmt: skip
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
    assert set(result) == {"machine", "rounds", "exact", "select", "bandwidth", "small", "loop"}
    assert result["machine"]["card"].startswith("none")
    assert {row["kind"] for row in result["exact"]} == {"normal", "nan"}
    for row in (*result["select"], *result["bandwidth"]):
        assert all(isinstance(s, float) for s in row["seconds"].values()), row
    assert [row["fused"] for row in result["loop"]] == [True, False]


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


# -- tables ---------------------------------------------------------------------------------------


def test_tables_address_every_element_once_past_32_bits_too():
    sizes = np.array([3_000_000_000, 0, 5, 65536, 65537])
    kinds = np.array([[0, 0, 1, 2, 2], [1, 1, 1, -1, 0]])
    strides = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    addresses = np.array([[1 << 40, 0, 48, 64, 66], [16, 0, 32, 0, 96]])
    row, at, length, full = _tables.split(addresses, kinds, strides, sizes, 1 << 16)
    assert at.dtype == np.int64
    assert np.bincount(row, weights=length).tolist() == sizes.tolist()
    first = row == 0
    ends = at[0, first] + 4 * length[first]
    assert (ends[:-1] == at[0, first][1:]).all()  # no gap, no overlap
    assert ends[-1] == (1 << 40) + 4 * 3_000_000_000
    assert (at[1, first] == 16).all()  # one value, expanded
    assert not full[first].any()
    assert full[row == 3].tolist() == [True]  # a missing column is no obstacle
    assert full[row == 4].tolist() == [False, False]  # 66 is no multiple of 16


def test_launches_are_the_runs_of_equal_columns():
    kinds = np.array([[0, 0, 0, 1, 1, 0], [2, 2, -1, -1, -1, -1]])
    got = _tables.launches(kinds, first=7)
    assert got == [((0, 2), 7, 2), ((0, -1), 9, 1), ((1, -1), 10, 2), ((0, -1), 12, 1)]
    assert _tables.launches(kinds[:, :0]) == []


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.ones(3, 4), 1),
        (torch.ones(3, 4).mT, 1),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 1),
        (torch.ones(3, 8)[:, :4], None),
        (torch.ones(8)[::2], None),
        (torch.ones(()).expand(3, 4), 0),
        (torch.ones(4).expand(3, 4), None),
        (torch.ones(()), 1),
        (torch.ones(0, 3), 1),
    ],
)
def test_layouts_that_are_one_stretch_of_memory(tensor, stride):
    assert _tables.flat_stride(tensor) == stride


def test_uploaded_parts_are_the_arrays():
    arrays = [np.arange(6).reshape(2, 3), np.array([True, False]), np.zeros((5, 0), np.int64)]
    parts, _ = _tables.upload(arrays, torch.device("cpu"))
    assert [p.tolist() for p in parts] == [a.astype(int).tolist() for a in arrays]
    assert all(p.dtype == torch.int64 for p in parts)
    assert reference.STATS[-1] == "update_nonfinite"  # the order that combine_kernel writes
    assert len(reference.STATS) == 14
