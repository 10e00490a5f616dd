"""What the Triton kernels are launched with for models of any size, within CUDA's limits.

Everything is made of meta tensors and of the launch plan alone: no memory is taken, nothing runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from ebu_optim.kernels import _launch, _launch_combination, _launch_plan, _launch_selection, _tables
from ebu_optim.kernels.contract import STATS, Columns, Update

from .inputs import ADDED

META = torch.device("meta")
INT32 = 2**31 - 1
GRID = (INT32, 65535, 65535)
#: name: sizes of the tensors. The second is about SDXL's UNet.
MODELS = {
    "one scalar": [1],
    "3e9 scalars in 2000 tensors": [1_500_000] * 2000,
    "1e10 scalars in 10,000 tensors": [1_000_000] * 10_000,
    "1e10 scalars in one tensor": [10**10],
    "2**31 + 5 scalars in one tensor": [2**31 + 5],
    "20,000 tensors of one scalar": [1] * 20_000,
}
every_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Launched(NamedTuple):
    name: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def launched(monkeypatch):
    """Every launch, none of which runs; meta tensors are taken for a card's."""
    calls = []

    class Kernels:
        def __getattr__(self, name):
            class Kernel:
                def __getitem__(self, grid):
                    return lambda *args, **options: calls.append(
                        Launched(name, grid, args, options)
                    )

            return Kernel()

    monkeypatch.setattr(_launch, "kernels", Kernels)
    for module in (_launch, _launch_combination):
        monkeypatch.setattr(module, "runs_on", lambda device: device == META)
    monkeypatch.setattr(_tables, "_cache", type(_tables._cache)())
    return calls


def tensors(sizes, dtype=torch.float32):
    return [torch.empty(n, dtype=dtype, device=META) for n in sizes]


def select(sizes, dtype, granularity="model"):
    grads = tensors(sizes, dtype)
    n = sum(sizes)
    if granularity == "model":
        pools = [(grads, max(1, n // 2))] * 2
    else:
        pools = [([g], max(1, g.numel() // 2)) for g in (*grads, *grads)]
    return _launch_selection.select(pools, torch.float32)


def combine(sizes, dtype):
    columns = [tensors(sizes, dtype) for _ in range(7)]
    _launch_combination.combine(
        Columns(*columns, [0] * len(sizes), [1] * len(sizes)),
        torch.empty(2, dtype=torch.int64, device=META),
        Update(ADDED, 1.0, 0.1, None, torch.float32),
        torch.empty(len(STATS), dtype=torch.float64, device=META),
    )
    _launch_combination.restore(columns[0], columns[6])
    _launch_selection.finite_probe(columns[0])
    _launch_selection.histogram(columns[0], 0, 20, 11, torch.float32)


def rows(t):
    return t.shape[0] if t.dim() == 2 else 0


@every_model
@every_dtype
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_launches_are_within_the_limits_of_cuda(launched, sizes, dtype, granularity):
    select(sizes, dtype, granularity)
    combine(sizes, dtype)
    assert {"digit_kernel", "finish_kernel", "combine_kernel", "restore_kernel"} <= {
        call.name for call in launched
    }
    for call in launched:
        assert all(1 <= n <= most for n, most in zip(call.grid, GRID)), call
        assert 32 * call.options["num_warps"] <= 1024, call
        # a number that 32 bits do not hold would be compiled for as another
        assert all(abs(a) <= INT32 for a in call.args if isinstance(a, int)), call
        # what the kernels multiply in 32 bits: a row of a table times its length
        assert all(t.numel() <= INT32 for t in call.args if isinstance(t, torch.Tensor) and rows(t))
    assert len(launched) <= 5 + 4 + 1 + 2 + 3, "launches grow with the tensors"


@every_model
@every_dtype
def test_every_scalar_is_in_one_chunk_of_one_launch(launched, sizes, dtype):
    """Of the plan on the CPU, where its tables can be read; the addresses are those of meta, 0."""
    grads, device = tensors(sizes, dtype), torch.device("cpu")
    plan, _ = _launch_plan.read_plan([(grads, 1)], device)
    assert int(plan.chunks[1].sum()) == sum(sizes)
    assert int(plan.chunks[1].max()) <= _tables.CHUNK
    assert sum(launch.programs for launch in plan.all) == plan.chunks.shape[1]
    # addresses have 64 bits: the last chunk's is past those of 32 where the tensor is
    last = -(-max(sizes) // _tables.CHUNK) - 1
    assert int(plan.chunks[0].max()) == last * _tables.CHUNK * dtype.itemsize
    assert plan.wide == (sum(sizes) > INT32)
    size, windowed = _launch_plan.WINDOW_MIN, _launch_plan.WINDOW_MIN_16
    assert len(plan.members) == (sum(sizes) >= (size if dtype.itemsize == 4 else windowed))


@every_model
def test_tables_and_memory_of_a_step_are_small_beside_the_gradients(launched, sizes):
    dtype = torch.float32
    select(sizes, dtype)
    combine(sizes, dtype)
    chunks = sum(-(-size // _tables.CHUNK) for size in sizes)
    made = {id(t): t for call in launched for t in call.args if isinstance(t, torch.Tensor)}
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in made.values()}
    # tables of 5 and 11 rows for two gradients and three columns, 14 sums; two windows' counts
    windows = 2 * (1 << 20 | 1 << 15) * 4 + 2 * 256 * 8
    assert sum(held.values()) <= 8 * chunks * (4 * 5 + 2 * 11 + 14) + windows + 100_000
    if sum(sizes) >= 10**9:
        assert sum(held.values()) < 0.01 * sum(sizes) * dtype.itemsize


def test_counts_of_a_chunk_fit_the_bits_they_have():
    for tile, lane in ((512, 4), (1024, 8)):  # of `combine_kernel`, two counts in one integer
        assert _tables.CHUNK // tile * lane < 2**15
    assert _tables.CHUNK * 4 <= INT32  # bytes: offsets inside a chunk have 32 bits
    bins = _launch_plan.WIDTH << 16
    assert bins // 4096 <= 256  # FOLD bins a program of `fold_kernel`, FOLDS of them a window
    assert bins & (bins - 1) == 0
    assert _launch_plan.SAMPLE_MAX * _tables.CHUNK < 2**63
    assert _tables.CHUNK & (_tables.CHUNK - 1) == 0
