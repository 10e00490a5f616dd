"""Selection against the NumPy oracle: thresholds and masks bit for bit, every path of it taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebu_optim.kernels import _chunked_selection, chunked, reference

from . import oracle
from .inputs import (
    FINITE,
    REAL,
    TINY,
    assert_masks,
    combine,
    constants,
    every_backend,
    fill,
    gradients,
    numpy,
    rank,
    sizes,
    threshold,
    total,
)
from .poison import poison  # noqa: F401

fast = settings(deadline=None, max_examples=150)


def value(grads, k, kernels=chunked):
    dtype = reference.working_dtype(grads)
    key = threshold(grads, k, dtype, kernels)
    assert key.shape == ()
    assert key.dtype == torch.int64
    return float(reference.key_to_value(key, dtype))


# -- threshold ----------------------------------------------------------------------------------


@every_backend
@fast
@given(make=gradients(), sizes=sizes, data=st.data())
def test_threshold_is_the_exact_kth_largest_magnitude(kernels, make, sizes, data):
    grads = make()
    n = total(grads)
    if n == 0:
        with pytest.raises(ValueError, match="k must be in"):
            threshold(grads, 1, torch.float32, kernels)
        return
    k = data.draw(st.one_of(st.sampled_from((1, n)), st.integers(1, n)), "k")
    with constants(sizes):
        got = value(grads, k, kernels)
    np.testing.assert_array_equal(got, oracle.threshold(numpy(grads), k))


@every_backend
@pytest.mark.parametrize("k", [0, -1, 4])
def test_rank_outside_the_elements_is_an_error(kernels, k):
    with pytest.raises(ValueError, match=r"k must be in 1\.\.3.* got " + str(k)):
        threshold([torch.ones(3)], k, torch.float32, kernels)


def sampled(n, size):
    """The positions that the sample of a single tensor looks at."""
    return torch.cat([index for _, index in _chunked_selection._sample_plan((n,), size)]).unique()


N, SAMPLE = 4000, 64
DRAWN = sampled(N, SAMPLE)


def adversary(path):
    x = torch.linspace(1, 2, N)[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    if path == "refuted: too low":  # the sample sees only the small ones
        x += 10
        x[DRAWN] -= 10
    if path == "refuted: too high":
        x[DRAWN] += 10
    if path == "ties":
        x[:] = 1.0
        x[::3] = 2.0
    if path == "two clusters":  # the bracket spans the gap and half of everything
        x[::2] = 1 + torch.arange(N // 2) * 2.0**-23
        x[1::2] = 1e30
    return x


@pytest.mark.parametrize(
    ("path", "capacity", "k"),
    [
        ("no bracket", 5000, 1300),
        ("bracket", 3500, 1300),
        ("refuted: too low", 200, 3200),
        ("refuted: too low", 5000, 3200),
        ("refuted: too high", 200, 1300),
        ("refuted: too high", 5000, 1300),
        ("overfull", 3, 1300),
        ("ties", 3, 1300),
        ("ties", 3, 1500),
        ("two clusters", 3, 2000),
        ("two clusters", 3, 2001),
        ("two clusters", 3, 2500),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_of_the_selection_is_taken_and_exact(path, capacity, k, dtype):
    x = adversary(path).to(dtype)
    least = N if path == "no bracket" else SAMPLE
    values = {"CHUNK_CPU": 97, "CAPACITY": capacity, "SAMPLE_MIN": least, "SAMPLE_MAX": SAMPLE}
    with constants(values) as scans:
        got = value([x], k)
    assert got == oracle.threshold(numpy([x]), k)
    lo, hi, above, inside, collected = scans[0]
    top, bits = {torch.float32: (0x7FFFFFFF, 31), torch.float64: ((1 << 63) - 1, 63)}[dtype]
    assert len(scans) <= 1 + bits
    if path == "no bracket":
        assert scans == [(0, top, 0, N, True)]
    else:
        assert lo > 0 or hi < top
    if path == "bracket":
        assert len(scans) == 1
        assert collected
        assert inside < N
    if path == "refuted: too low":
        assert above >= k
        assert scans[1][0] == hi + 1
    if path == "refuted: too high":
        assert above + inside < k
        assert scans[1][0] == 0
    if path.startswith("refuted") and capacity == 5000:
        assert len(scans) == 2
    if path in ("overfull", "two clusters"):
        assert above < k <= above + inside
        assert not collected
        assert len(scans) > 5
        assert all(lo <= a <= b <= hi for a, b, *_ in scans[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_ends_in_as_many_passes_as_a_key_has_bits(dtype):
    """No room for candidates, neighbours at both ends of the number line."""
    info = torch.finfo(dtype)
    ends = [info.smallest_normal * info.eps, info.max, math.inf, math.nan]
    ends = torch.tensor(ends, dtype=dtype)
    x = torch.cat([ends, ends / 2, torch.zeros(9, dtype=dtype)]).repeat(8)
    for k in range(1, len(x) + 1, 3):
        with constants(TINY | {"CAPACITY": 1}) as scans:
            got = value([x], k)
        np.testing.assert_array_equal(got, oracle.threshold(numpy([x]), k))
        assert 1 <= len(scans) <= 1 + (31 if dtype == torch.float32 else 63)


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "sorted"])
def test_large_tensors_with_the_real_constants_take_one_pass(kind):
    n = 5 * _chunked_selection.SAMPLE_MIN
    rng = np.random.default_rng(1)
    x = {
        "normal": rng.standard_normal(n),
        "heavy": rng.standard_cauchy(n) ** 3,
        "ties": rng.integers(-50, 50, n) / 64,
        "sorted": np.linspace(-1, 1, n) ** 5,
    }[kind]
    x = torch.tensor(x, dtype=torch.float32)
    grads = [x[: n // 2].view(-1, 64).t(), x[n // 2 : -7].half().to(torch.bfloat16), x[-7:]]
    for delta in (1e-6, 0.1, 0.5, 1.0):
        with constants(REAL) as scans:
            got = value(grads, rank(n, delta))
        assert got == oracle.threshold(numpy(grads), rank(n, delta))
        assert len(scans) == 1
        assert scans[0][1] - scans[0][0] < 0x7FFFFFFF


@every_backend
def test_pools_are_ranked_apart_and_nonfinite_elements_counted(kernels):
    bad = torch.tensor([math.nan, 1.0, -math.inf, 3e38, math.inf])
    pools = [([bad, torch.ones(3).half()], 4), ([torch.arange(9.0)], 2), ([bad[1:2]], 1)]
    taus, nonfinite = kernels.select(pools, torch.float32)
    assert nonfinite.tolist() == [3, 0, 0]
    assert reference.key_to_value(taus, torch.float32).tolist() == pytest.approx([3e38, 7.0, 1.0])


@every_backend
@fast
# not NaN: its bits may change as 16 bits become 32
@given(make=gradients((*FINITE, "inf")), sizes=sizes, data=st.data())
def test_histogram_counts_the_next_digit_of_the_keys_that_begin_with_the_prefix(
    kernels, make, sizes, data
):
    grads = make()
    dtype = reference.working_dtype(grads)
    top = reference.key_bits(dtype)
    bits = data.draw(st.integers(1, 12), "bits")
    shift = data.draw(st.integers(0, top - bits), "shift")
    keys = [reference.keys(g, dtype).flatten().numpy() for g in grads]
    keys = np.concatenate([k.astype(np.int64) for k in keys])
    prefix = int(data.draw(st.sampled_from([0, *keys.tolist()[:3]]), "key")) >> (shift + bits)
    with constants(sizes):
        counts = kernels.histogram(grads, torch.tensor(prefix), shift, bits, dtype)
    digits = keys[keys >> (shift + bits) == prefix] >> shift & ((1 << bits) - 1)
    np.testing.assert_array_equal(counts, np.bincount(digits, minlength=1 << bits))
    assert kernels.histogram([], 0, shift, bits, dtype).tolist() == [0] * (1 << bits)


# -- masks --------------------------------------------------------------------------------------


@every_backend
@fast
@given(make=gradients(), sizes=sizes, delta=st.sampled_from((1e-9, 0.1, 0.5, 0.9, 1.0)))
def test_masks_are_the_oracles_bit_for_bit(kernels, make, sizes, delta):
    """With one gradient zero, what is not held is exactly the mask of the other."""
    grads, theta, zeros = make(), make("normal"), make("zero")
    if total(grads) == 0:
        return
    masks, taus = oracle.select(numpy(grads), [delta] * len(grads))
    if np.isnan(taus).any():  # this has a test of its own
        return
    for pair in ((grads, zeros), (zeros, grads)):
        with constants(sizes):
            _, held, stats = combine(theta, *pair, delta=(delta, delta), kernels=kernels)
        assert_masks(held, theta, masks)
        count = sum(int(m.sum()) for m in masks)
        names = ("forget_selected", "remember_selected")
        assert [stats[n] for n in names] == ([count, 0] if pair[0] is grads else [0, count])


@every_backend
def test_nan_ranks_above_inf_and_all_nan_are_tied_whatever_their_bits(kernels):
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, -0x400000, 0x7F800001], dtype=torch.int32)
    g = [torch.cat([torch.tensor([math.inf, 3e38, 1.0]), bits.view(torch.float32)])]
    theta, zeros = [torch.ones(7)], [torch.zeros(7)]
    assert g[0].isnan().sum() == 4
    for k in range(1, 8):
        masks, _ = oracle.select(numpy(g), [k / 7])
        _, held, stats = combine(theta, g, zeros, delta=(k / 7, 0.5), kernels=kernels)
        assert stats["forget_selected"] == max(k, 4), k
        assert_masks(held, theta, masks)


@every_backend
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16", "float32 bfloat16"])
def test_masks_are_immune_to_flush_to_zero(kernels, dtypes):
    dtypes = [getattr(torch, d) for d in dtypes.split()]
    g = [fill("denormal", (200,), d, np.random.default_rng(0)) for d in dtypes]
    theta, zeros = [torch.ones(200).to(d) for d in dtypes], [t * 0 for t in g]
    masks, _ = oracle.select(numpy(g), [0.3] * len(g))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        _, held, stats = combine(theta, g, zeros, delta=(0.3, 0.3), kernels=kernels)
    finally:
        torch.set_flush_denormal(False)
    count = sum(m.sum() for m in masks)
    assert 0 < count < total(g)
    assert stats["forget_selected"] == count
    assert_masks(held, theta, masks)
