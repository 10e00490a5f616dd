"""Every launch path on cases of any kind, against the reference; and that every path was taken.

FUZZ_CASES and FUZZ_SEED, which `make fuzz` sets, ask for more cases than the few, always the same,
of an ordinary run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, seed, settings

from ebu_optim.kernels import reference
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels.contract import STATS, Columns

from . import cases
from .cases import Case, Placed
from .paths import PATHS, recorded

CASES, SEED = int(os.environ.get("FUZZ_CASES", "15")), os.environ.get("FUZZ_SEED")
taken: Counter[str] = Counter()
few = settings(
    deadline=None,
    max_examples=CASES,
    derandomize=SEED is None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, *([Phase.shrink] if SEED else [])),
)


def every_listed(test):
    for case in cases.listed():
        test = example(case)(test)
    return test


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def close(got, want, size, work):
    """To the rounding of `got` and 32 roundings of the working dtype, in which terms of `size` are
    added up; what is not finite is so in both, but where rounding decides whether it overflows."""
    own, work = torch.finfo(got.dtype), torch.finfo(work)
    g, w = (x.double().clamp(-own.max, own.max) for x in (got, want))
    near = w.abs() > own.max * (1 - 4 * own.eps)
    assert (got.isfinite() | near).equal(want.isfinite() | near)
    bound = 32 * work.eps * (size + work.smallest_normal)
    bound = bound + own.eps * (w.abs() + own.smallest_normal)
    error = (g - w).abs()
    wrong = ~(error <= bound) & want.isfinite() & ~near & size.isfinite()
    assert not wrong.any(), (got.dtype, g[wrong], w[wrong], bound[wrong])


def twins(x):
    """The same values, contiguous; columns that are one tensor stay one."""
    made = {}
    copy = lambda t: t.clone(memory_format=torch.contiguous_format)  # noqa: E731
    return {
        name: [None if t is None else made.setdefault(id(t), copy(t)) for t in column]
        for name, column in x.items()
    }


def selection(case: Case, x, plain):
    """Keys and counts, bit for bit; the probe and the histogram beside."""
    pools, where = cases.ranked(case, x["g_f"], x["g_r"])
    others, _ = cases.ranked(case, plain["g_f"], plain["g_r"])
    dtype = reference.working_dtype([*x["g_f"], *x["g_r"]])
    probe = fused.finite_probe(x["g_f"])
    finite = [bool(g.isfinite().all()) for g in plain["g_f"] if g.numel()]
    assert probe is None if not finite else bool(probe.isfinite()) == all(finite)
    shift, bits = case.digit
    some = reference.keys(plain["g_r"][0], dtype).reshape(-1)[:1].tolist() if x["g_r"] else []
    prefix = (some or [0])[0] >> shift >> bits
    counts = fused.histogram(x["g_r"], prefix, shift, bits, dtype)
    # NaN of 16 bits may get other bits on their way to 32
    if all(g.isnan().sum() == 0 for g in plain["g_r"]):
        assert counts.equal(reference.histogram(plain["g_r"], prefix, shift, bits, dtype))
    nothing = torch.tensor([reference.key_of_nothing(dtype)])
    if not pools:
        return torch.cat([torch.zeros_like(nothing), nothing]), where, dtype
    keys, bad = fused.select(pools, dtype)
    want, count = reference.select(others, dtype)
    assert keys.tolist() == want.tolist()
    assert bad.tolist() == count.tolist()
    if case.seed % 4 == 0:
        assert fused.select(pools, dtype)[0].equal(keys)
    return torch.cat([keys, nothing]), where, dtype


def combination(case: Case, x, plain, keys, where, dtype):
    """G and F to rounding; masks, counts and what is held bit for bit."""
    stats, sums = (torch.zeros(len(STATS), dtype=torch.float64) for _ in range(2))
    rows = Columns(**x, pool_f=where[0], pool_r=where[1])
    others = Columns(**plain, pool_f=where[0], pool_r=where[1])
    before = {n: [None if t is None else t.double() for t in c] for n, c in plain.items()}
    fused.combine(rows, keys, cases.update(case, dtype, case.tensors), stats)
    reference.combine(others, keys, cases.update(case, dtype, False), sums)
    scale = 1.0 if case.inv_scale is None else case.inv_scale
    for i in range(len(case.rows)):
        f, r = (scale * before[n][i].abs() for n in ("g_f", "g_r"))
        size = sum(map(abs, case.numbers or (3,))) * (f + r)
        if x["anchors"][i] is not None and x["fishers"][i] is not None:
            moved = before["params"][i].abs() + before["anchors"][i].abs()
            size = size + case.gamma * before["fishers"][i].abs() * moved
        close(x["out"][i], plain["out"][i], size, dtype)
        if x["fishers"][i] is not None:
            close(x["fishers"][i], plain["fishers"][i], r * r + before["fishers"][i].abs(), dtype)
        if x["held"][i] is not None:
            same(x["held"][i], plain["held"][i])
    if case.counted:
        assert stats[:4].tolist() == sums[:4].tolist()
    assert stats[13] == sum(int((~t.isfinite()).sum()) for t in x["out"])
    finite = (
        t.isfinite().all() for n in ("g_f", "g_r", "fishers") for t in before[n] if t is not None
    )
    if all(finite) and not stats[13]:
        close_sums(case, stats, sums)


def close_sums(case: Case, stats, sums):
    torch.testing.assert_close(stats[7], sums[7], rtol=2e-3, atol=1e-30)
    torch.testing.assert_close(stats[12], sums[12], rtol=2e-3, atol=1e-30)
    if case.counted:
        among = 1e-5 * float(sums[5].sqrt() * sums[6].sqrt()) + 1e-37
        torch.testing.assert_close(stats[4], sums[4], rtol=0, atol=among)
        torch.testing.assert_close(stats[5:7], sums[5:7], rtol=2e-3, atol=1e-30)
        rest = 1e-5 * float(sums[8:12].sum()) + 1e-30  # `chunked` has what is left of the sum
        torch.testing.assert_close(stats[8:12], sums[8:12], rtol=1e-5, atol=rest)


def restored(x, plain):
    for c in (x, plain):
        for theta in c["params"]:
            theta.add_(1)
    fused.restore(x["params"], x["held"])
    reference.restore(plain["params"], plain["held"])
    for got, want in zip(x["params"], plain["params"]):
        same(got, want)


@few
@seed(int(SEED or 0))
@every_listed
@given(case=cases.cases)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_path_is_the_references(case):
    place = Placed()
    x = cases.build(case, place)
    plain = twins(x)
    with recorded(case, taken):
        keys, where, dtype = selection(case, x, plain)
        place.untouched([])
        combination(case, x, plain, keys, where, dtype)
        written = [t for n in ("out", "held", "fishers") for t in x[n] if t is not None]
        place.untouched(written)
        restored(x, plain)
    place.untouched([*written, *x["params"]])


def test_every_path_was_taken():
    if to := os.environ.get("FUZZ_PATHS"):
        Path(to).write_text(json.dumps(dict(sorted(taken.items())), indent=1))
    assert [path for path in PATHS if not taken[path]] == []
    assert set(taken) <= set(PATHS)
