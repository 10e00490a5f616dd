"""`_triton_window`: the guess, its proof and its refutation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ebu_optim.kernels import _launch, _launch_plan, reference
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels._triton_window import find, sampled_bin

from ..inputs import fill, lay_out
from .shared import TAKEN, clusters, settled


@triton.jit
def find_kernel(counts, rank, found, N: tl.constexpr):
    bins = tl.arange(0, N)
    place, left = find(tl.load(counts + bins), bins, rank)
    tl.store(found, place)
    tl.store(found + 1, left)


def test_find_walks_down_from_the_top_bin():
    counts = [3, 0, 2, 1, 0, 4, 0, 0]
    found = torch.empty(2, dtype=torch.int32)
    got = []
    for rank in range(1, sum(counts) + 1):
        find_kernel[(1,)](torch.tensor(counts, dtype=torch.int32), rank, found, N=len(counts))
        got.append(tuple(found.tolist()))
    assert got == [(b, r) for b in range(7, -1, -1) for r in range(1, counts[b] + 1)]


@triton.jit
def sampled_kernel(samples, rank, found):
    rows = tl.arange(0, 256)
    cells = tl.load(samples + rows[:, None] * 128 + tl.arange(0, 128)[None, :])
    tl.store(found, sampled_bin(samples, tl.sum(cells, 1), rows, rank))


def test_bin_of_a_rank_in_the_sample_is_found_in_two_steps():
    counts = torch.randint(0, 3, (32768,), dtype=torch.int32)
    found = torch.empty((), dtype=torch.int32)
    bins = torch.arange(32768).repeat_interleave(counts).flip(0)  # of each rank, from the top
    for rank in (1, 2, 128, len(bins) // 2, len(bins)):
        sampled_kernel[(1,)](counts, rank, found)
        assert found == bins[rank - 1]


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.parametrize("kind", ["normal", "ties", "denormal", "nan"])
@pytest.mark.usefixtures("windows")
def test_keys_through_a_window_or_its_fallback_are_the_references(kind, dtype):
    x = fill(kind, (700,), dtype, np.random.default_rng(0))
    parts = [x[:300], x[300:301], lay_out(x[301:].view(21, 19), "transposed")]
    pools = [(parts, k) for k in (1, 350, 700)]
    got, want = fused.select(pools, torch.float32), reference.select(pools, torch.float32)
    assert [t.tolist() for t in got] == [t.tolist() for t in want]


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.usefixtures("windows")
def test_window_settles_what_the_sample_shows(dtype):
    """The rank's neighbourhood lies in one of many bins: no radix pass counts anything."""
    x = clusters().to(dtype)
    pools = [([x], k) for k in (60, 420, 900)]
    keys, done = settled(pools)
    assert keys.tolist() == reference.select(pools, torch.float32)[0].tolist()
    assert done == [1, 1, 1]


@pytest.mark.usefixtures("windows")
def test_pool_may_mix_dtypes():
    parts = [x.to(d) for x, d in zip(clusters().split(400), TAKEN)]
    pools = [(parts, 540), (parts[1:], int(0.45 * 800))]
    keys, done = settled(pools)
    assert keys.tolist() == reference.select(pools, torch.float32)[0].tolist()
    assert done == [1, 1]


class Sampled:
    """The positions of one tensor of n elements that the sample looks at."""

    def __init__(self, n, monkeypatch):
        seen = torch.zeros(1, 32768, dtype=torch.int32)
        bins = torch.arange(n, dtype=torch.int32) << 16  # each element in a bin of its own
        with monkeypatch.context() as patch:
            patch.setattr(_launch_plan, "WINDOW_MIN", 1)
            plan, _ = _launch_plan.read_plan([([bins.view(torch.float32)], 1)], bins.device)
        for (kind,), first, count in plan.windowed:
            _launch.kernels().sample_kernel[(count,)](
                plan.chunks, plan.chunks.shape[1], first, plan.pools, 1, seen, KIND=kind, TILE=256
            )
        self.at = seen[0, :n] > 0
        self.count = int(seen.sum())


def test_sample_is_drawn_evenly_with_the_size_asked_for(monkeypatch):
    monkeypatch.setattr(_launch_plan, "SAMPLE_MIN", 1500)
    n = 3000
    drawn = Sampled(n, monkeypatch)
    assert abs(drawn.count - 1500) <= n / 96 + 1  # each chunk rounds its share
    assert Sampled(n, monkeypatch).at.equal(drawn.at)
    share = 1 - math.exp(-0.5)
    assert float(drawn.at.float().mean()) == pytest.approx(share, abs=0.05)
    halves = drawn.at.view(2, -1).float().mean(1)
    assert float((halves[0] - halves[1]).abs()) < 0.06


@pytest.mark.parametrize("path", ["too low", "too high", "crowded"])
@pytest.mark.parametrize("dtype", TAKEN)
def test_window_that_missed_is_refuted_and_the_radix_selection_finds_the_key(
    path, dtype, monkeypatch
):
    n = 1500
    monkeypatch.setattr(_launch_plan, "SAMPLE_MIN", 300)
    drawn = Sampled(n, monkeypatch).at
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN", 1)
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN_16", 1)
    x = torch.linspace(1, 2, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    if path == "too low":
        x = torch.where(drawn, x, x * 1000)
    if path == "too high":
        x = torch.where(drawn, x * 1000, x)
    if path == "crowded":  # a quarter and more would be counted at few addresses
        x = 1 + x / 1000
    x = x.to(dtype)
    k = 200 if path == "too high" else n // 2
    keys, done = settled([([x], k)])
    assert keys.tolist() == reference.select([([x], k)], torch.float32)[0].tolist()
    if path == "crowded" and dtype != torch.float32:
        assert done == [1]  # 16-bit keys are counted in the block
    else:
        assert done == [0]


@pytest.mark.usefixtures("windows")
def test_rank_among_zeros_needs_no_second_pass():
    x = torch.cat([torch.zeros(900), 2.0 ** torch.linspace(-9, 9, 300)])
    keys, done = settled([([x], 700), ([x], 301), ([x], 300)])
    assert keys.tolist() == [0, 0, int(reference.keys(x, torch.float32)[900])]
    assert done[0] == 1


@pytest.mark.usefixtures("windows")
def test_window_whose_bins_do_not_add_up_settles_nothing(monkeypatch):
    """As after the overflow of a 32-bit bin, which takes 2**31 equal elements."""
    x = clusters()
    module, calls = _launch.kernels(), []

    class Doctored:
        def __getitem__(self, grid):
            def launch(pools, n_pools, members, hist, partial, **options):
                hist[hist.argmax()] += 1
                calls.append(fold[grid](pools, n_pools, members, hist, partial, **options))

            return launch

    fold = module.fold_kernel
    monkeypatch.setattr(module, "fold_kernel", Doctored())
    keys, done = settled([([x], 420)])
    assert len(calls) == 1
    assert done == [0]
    assert keys.tolist() == reference.select([([x], 420)], torch.float32)[0].tolist()
