"""`_triton_radix`: selection by digits, histograms, and the probe for NaN and Inf."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ebu_optim.kernels import _launch_plan, _launch_selection, reference
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels._triton_radix import prefix_of

from ..inputs import fill
from .shared import TAKEN

SHIFTS = (23, 15, 7, 0)


@triton.jit
def prefix_kernel(hist, pool, rank, found, LEVEL: tl.constexpr):
    prefix, left = prefix_of(hist, pool, rank, LEVEL)
    tl.store(found, prefix)
    tl.store(found + 1, left)


@pytest.mark.parametrize("level", range(5))
def test_digits_found_so_far_and_the_rank_among_the_keys_that_begin_so(level):
    x = fill("wide", (300,), torch.float32, np.random.default_rng(0))
    keys = reference.keys(x, torch.float32).sort(descending=True).values.tolist()
    for rank in (1, 150, 300):
        key = keys[rank - 1]
        hist = torch.zeros(2, 4, 256, dtype=torch.int64)  # the second pool's is looked at
        for i, (low, above) in enumerate(zip(SHIFTS, (31, *SHIFTS))):
            alike = torch.tensor([k >> low for k in keys if k >> above == key >> above])
            hist[1, i] = torch.bincount(alike % (1 << above - low), minlength=256)
        found = torch.empty(2, dtype=torch.int64)
        prefix_kernel[(1,)](hist, 1, rank, found, LEVEL=level)
        low = (31, *SHIFTS)[level]
        greater = sum(k >> low > key >> low for k in keys)
        assert found.tolist() == [key >> low, rank - greater]


def test_counts_of_pools_past_32_bits_are_64_bits_wide():
    x = torch.linspace(-3, 3, 500)
    plan, _ = _launch_plan.read_plan([([x], 123)], x.device)
    assert not plan.wide
    keys, _, _ = _launch_selection._select(plan._replace(wide=True))
    assert keys.tolist() == reference.select([([x], 123)], torch.float32)[0].tolist()


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.parametrize(("prefix", "shift", "bits"), [(0, 20, 11), (0x3F9, 10, 10), (0, 26, 5)])
def test_histogram_is_the_references(dtype, prefix, shift, bits):
    x = fill("inf", (400,), dtype, np.random.default_rng(1))
    grads = [x[:390], x[391:], x[:0], x[0].expand(30)]
    want = reference.histogram(grads, prefix, shift, bits, torch.float32)
    for p in (prefix, torch.tensor(prefix)):
        assert fused.histogram(grads, p, shift, bits, torch.float32).equal(want)
    assert fused.histogram([], 0, shift, bits, torch.float32).equal(want * 0)
    assert fused.histogram([x.double()], 0, 0, 3, torch.float64).shape == (8,)


@pytest.mark.parametrize("dtype", TAKEN)
def test_probe_is_nan_where_one_element_is_not_finite(dtype):
    x = torch.full((500,), torch.finfo(dtype).max, dtype=dtype)
    parts = list(x.split([100, 396, 4]))
    assert fused.finite_probe(parts).item() == 0
    assert fused.finite_probe([x[:0]]) is None
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, 150, 499):
            y = x.clone()
            y[at] = bad
            assert fused.finite_probe(list(y.split([100, 396, 4]))).isnan()
