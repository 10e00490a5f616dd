"""The fused kernels in Triton's interpreter, on CPU tensors; `test_triton.py` runs this file in a
process of its own, since Triton reads TRITON_INTERPRET when it is imported.

Chunks and tiles are tiny here, so that every loop goes round more than once. What the interpreter
cannot show are races and speed: tests/benchmarks/gpu.py is for a machine with a GPU.
"""

from __future__ import annotations

import functools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ebu_optim import EBUOptimizer, kernels
from ebu_optim.kernels import (
    _launch,
    _launch_plan,
    _launch_selection,
    _tables,
    chunked,
    reference,
)
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels.contract import Columns, Update

from . import inputs, oracle, test_combine
from .inputs import fill, gradients, lay_out, numpy, rank, total
from .test_combine import (  # noqa: F401
    test_anchor_and_fisher_may_be_held_in_other_dtypes_than_the_parameters,
    test_loss_scale_is_undone_before_all_but_the_selection,
    test_online_fisher_is_the_mean_of_the_squares_and_used_before_it_is_updated,
    test_opposed_share_counts_signs_also_where_the_product_underflows,
    test_output_may_be_the_remember_gradient_and_held_the_forget_gradient,
    test_restore_puts_back_the_unrelated_scalars_and_no_others,
    test_scaling,
)
from .test_kernels import (  # noqa: F401
    test_masks_are_immune_to_flush_to_zero,
    test_nan_ranks_above_inf_and_all_nan_are_tied_whatever_their_bits,
    test_pools_are_ranked_apart_and_nonfinite_elements_counted,
    test_rank_outside_the_elements_is_an_error,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "see tests/test_triton.py"

HALVES = (torch.float16, torch.bfloat16)
TAKEN = (torch.float32, *HALVES)
# no shrinking: a call takes a large part of a second here
slow = settings(deadline=None, max_examples=12, phases=(Phase.explicit, Phase.generate))
combine = functools.partial(inputs.combine, kernels=fused)
CONSTANTS = (
    (_tables, "CHUNK", 128),
    (_launch, "TILE", 64),
    (_launch_plan, "WINDOW_MIN", 1 << 40),
    (_launch_plan, "WINDOW_MIN_16", 1 << 40),
    (_launch_selection, "RADIX_TILE", 64),
    (_launch_selection, "RADIX_PROGRAMS", 3),
)


@pytest.fixture(autouse=True, scope="module")
def _fused():
    """Tiny chunks and no windows, also for the tests imported from other files."""
    with pytest.MonkeyPatch.context() as patch:
        for constant in CONSTANTS:
            patch.setattr(*constant)
        yield


@pytest.fixture
def windows(monkeypatch):
    """Every pool has a window."""
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN", 1)
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN_16", 1)
    monkeypatch.setattr(_launch_plan, "SAMPLE_MIN", 6000)


def settled(pools):
    """The keys, and which pools their window settled."""
    plan, _alive = _launch_plan.read_plan(pools, pools[0][0][0].device)
    keys, _, done = _launch_selection._select(plan)
    return keys, done.tolist()


def clusters():
    """Ten groups of 120 magnitudes, octaves apart, in no order: 1 to 1.004 times a power of 2."""
    x = 2.0 ** torch.arange(-5, 5).repeat_interleave(120) * torch.linspace(1, 1.003, 1200)
    return x[torch.randperm(1200, generator=torch.Generator().manual_seed(0))]


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# -- selection ------------------------------------------------------------------------------------


@slow
@given(make=gradients(), data=st.data())
def test_keys_are_the_oracles_for_all_pools_at_once(make, data):
    pools = [g for g in (make(), make()) if total(g)]
    if not pools:
        return
    pools = [(g, data.draw(st.integers(1, total(g)))) for g in (*pools, pools[0])]
    dtype = reference.working_dtype([t for g, _ in pools for t in g])
    keys, nonfinite = fused.select(pools, dtype)
    for (g, k), key in zip(pools, keys, strict=True):
        got = float(reference.key_to_value(key, dtype))
        np.testing.assert_array_equal(got, oracle.threshold(numpy(g), k))
    assert nonfinite.tolist() == [sum(int((~t.isfinite()).sum()) for t in g) for g, _ in pools]


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


def test_counts_of_pools_past_32_bits_are_64_bits_wide():
    x = torch.linspace(-3, 3, 500)
    plan, _ = _launch_plan.read_plan([([x], 123)], x.device)
    assert not plan.wide
    keys, _, _ = _launch_selection._select(plan._replace(wide=True))
    assert keys.tolist() == reference.select([([x], 123)], torch.float32)[0].tolist()


def test_copy_of_a_gradient_lives_until_it_is_read():
    """A layout that the kernels do not take is copied; its memory must not be used again yet."""
    x = torch.randn(40, 60)[:, ::2]
    want = reference.select([([x], 600)], torch.float32)[0]
    assert all(fused.select([([x], 600)], torch.float32)[0].equal(want) for _ in range(3))


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


# -- combination ----------------------------------------------------------------------------------


@slow
@given(
    make=gradients(inputs.FINITE), options=test_combine.choices, anchored=st.booleans(),
    online=st.sampled_from((None, 0.3, 1.0)),
)  # fmt: skip
def test_combination_is_the_oracles(make, options, anchored, online):
    if options["update"] == "routed":
        options |= {"terms": oracle.TERMS}
    arrays = test_combine.problem(make)
    if not total(arrays[0]):
        return
    used = [[t.clone() for t in a] for a in arrays]
    got = combine(*(arrays if anchored else arrays[:3]), online=online, **options)
    test_combine.against_the_oracle(used, got, options, anchored)


@pytest.mark.parametrize("dtype", TAKEN)
@pytest.mark.parametrize(
    ("update", "penalty"), [("added", "partial"), ("replaced", "full"), ("routed", "none")]
)
def test_update_is_the_references_to_one_rounding_and_its_own_bit_for_bit(dtype, update, penalty):
    rng = np.random.default_rng(0)
    arrays = [[fill("normal", (333,), dtype, rng)] for _ in range(5)]
    options = {"update": update, "penalty": penalty, "online": 0.25, "gamma": torch.tensor(0.3)}
    results = []
    for module in (fused, fused, reference):
        fisher = [arrays[4][0].abs().float()]
        out, held, stats = combine(*arrays[:4], fisher, kernels=module, **options)
        results.append((out, held, fisher, list(stats.values())))
    same(results[0], results[1])
    (out, held, fisher, stats), _, (want, kept, new, sums) = results
    same(held, kept)
    torch.testing.assert_close(out, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(fisher, new, rtol=1e-6, atol=1e-9)
    assert stats[:4] == sums[:4]
    assert stats == pytest.approx(sums, rel=1e-5, abs=1e-4)


def test_scalars_may_be_tensors_that_the_kernel_reads():
    g = test_combine.normal(100)
    columns = [[t] for t in g[:4]]
    scalars = {"gamma": 0.3, "online": 0.75, "inv_scale": torch.tensor(0.5)}
    tensors = {"gamma": torch.tensor(0.3), "online": torch.tensor(0.75, dtype=torch.float64)}
    fishers = [[g[4].abs()] for _ in range(2)]
    want = combine(*columns, fishers[0], **scalars)
    got = combine(*columns, fishers[1], **scalars | tensors)
    same(got[:2], want[:2])
    same(*fishers)


def test_nonfinite_gradients_propagate_as_in_the_reference():
    rng = np.random.default_rng(3)
    for dtype in TAKEN:
        theta, g_f, g_r = ([fill(kind, (200,), dtype, rng)] for kind in ("normal", "nan", "nan"))
        got, want = (combine(theta, g_f, g_r, kernels=m) for m in (fused, reference))
        same(got[0][0].isfinite(), want[0][0].isfinite())
        same(got[1], want[1])
        names = ("forget_selected", "remember_selected", "overlap", "update_nonfinite")
        assert [got[2][n] for n in names] == [want[2][n] for n in names]


def test_bfloat16_is_rounded_as_torch_rounds_it():
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 1000).astype(np.int32)
    edge = np.array(
        [0x7F7FFFFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x8000, 0x8001, 0x7FFFFFFF, -1]
    )
    x = torch.from_numpy(np.concatenate([bits, edge.astype(np.int32)])).view(torch.float32)
    zeros, theta = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bfloat16)
    out = [torch.full_like(theta, 7)]
    combine([theta], [zeros], [x.clone()], out=out, terms=("remember",), penalty="none")
    same(out[0], x.to(torch.bfloat16))


def test_rows_that_the_kernel_does_not_take_go_to_the_reference():
    """One call with every kind of row: the result is the same as row by row."""
    rng = np.random.default_rng(5)
    make = lambda d=torch.float32: [fill("normal", (12, 10), d, rng) for _ in range(5)]  # noqa: E731
    rows = [make(), make(torch.float16), make(), make(), make(), make()]
    rows[2][1] = rows[2][1].mT.contiguous().mT  # another layout than theta's
    rows[3][0] = lay_out(rows[3][0], "strided")
    rows[4][3] = rows[4][3].double()  # theta0
    rows[5][2] = torch.zeros(()).expand(12, 10)  # no remember gradient
    for row in rows:
        row[4] = row[4].abs().float()
    rows[4][4] = rows[4][4].double()
    columns = [list(c) for c in zip(*rows, strict=True)]
    taken, calls = [], []

    class Spy:
        select = staticmethod(fused.select)

        @staticmethod
        def combine(columns, *args):
            with pytest.MonkeyPatch.context() as patch:
                plain = chunked.combine
                patch.setattr(
                    chunked, "combine", lambda c, *a: (calls.append(len(c.params)), plain(c, *a))
                )
                fused.combine(columns, *args)
            taken.append(len(columns.params) - sum(calls))

    results = []
    for module in (Spy, reference):
        used = [[t.clone() if t.stride() != (0, 0) else t for t in c] for c in columns]
        for c, u in zip(columns, used):
            for j, t in enumerate(c):
                if t.stride() != u[j].stride():
                    u[j] = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)
        out, held, stats = combine(*used, kernels=module, online=0.5)
        results.append((out, held, used[4], list(stats.values())))
    assert (taken, calls) == ([3], [3])
    (out, held, fisher, stats), (want, kept, new, sums) = results
    same(held, kept)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(out[3:], want[3:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fisher, new)
    assert stats == pytest.approx(sums, rel=1e-5)


@pytest.mark.parametrize("dtype", TAKEN)
def test_restore_is_the_references(dtype):
    rng = np.random.default_rng(7)
    shapes = [(300,), (), (0,), (17, 13)]
    theta = [lay_out(fill("nan", s, dtype, rng), "transposed") for s in shapes]
    held = [torch.where(torch.rand(s) < 0.5, math.nan, 5.0).to(dtype) for s in shapes]
    held[1] = None
    held[3] = held[3].mT.contiguous().mT
    theta.append(theta[3].contiguous())  # a layout that differs from that of what is held
    held.append(held[3])
    twin = [t.clone() for t in theta]
    fused.restore(theta, held)
    reference.restore(twin, held)
    same(theta, twin)


# -- tables, launches, memory ---------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The operations that would start something on a device, or wait for it."""

    FREE = ("empty", "split", "view", "slice", "unbind", "select", "detach", "alias", "as_strided")

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.lstrip("_").startswith(self.FREE):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """The kernels' names in the order of their launches; none runs."""
    calls = []

    class Kernels:
        def __getattr__(self, name):
            class Kernel:
                def __getitem__(self, grid):
                    assert all(0 < n < 2**31 for n in grid)
                    return lambda *args, **options: calls.append(name)

            return Kernel()

    monkeypatch.setattr(_launch, "kernels", Kernels)
    return calls


def step(theta, g_f, g_r, fisher, granularity="model"):
    n = len(theta)
    if granularity == "model":
        pools = [(g_f, total(g_f) // 2), (g_r, total(g_r) // 2)]
        first, second = [0] * n, [1] * n
    else:
        pools = [([g], max(1, g.numel() // 2)) for g in (*g_f, *g_r)]
        first, second = range(n), range(n, 2 * n)
    keys, _ = fused.select(pools, torch.float32)
    fused.combine(
        Columns(theta, g_f, g_r, theta, fisher, g_r, [None] * n, first, second),
        keys,
        Update(0.6, 1.0, "partial", "added", (True,) * 3, None, None, torch.float32),
        torch.zeros(len(reference.STATS), dtype=torch.float64),
    )


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_small_models_take_eight_launches_and_no_wait_whatever_the_number_of_tensors(
    launched, count, granularity
):
    columns = [list(torch.randn(100_000).split(100_000 // count)) for _ in range(4)]
    step(*columns, granularity)  # the tables are made once
    launched.clear()
    with Recorded() as recorded:
        step(*columns, granularity)
    assert launched == ["digit_kernel"] * 4 + ["finish_kernel", "combine_kernel", "reduce_kernel"]
    assert recorded.ops == ["zeros", "zeros"]  # one of them is this test's stats


def test_large_models_launch_the_window_and_the_fallback_without_asking(launched, monkeypatch):
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN", 1000)
    columns = [list(torch.randn(2000).split(500)) for _ in range(4)]
    step(*columns)
    window = ["sample", "bracket", "window", "fold", "settle"]
    radix = ["digit"] * 4 + ["finish"]
    assert launched == [f"{n}_kernel" for n in (*window, *radix, "combine", "reduce")]


def test_tables_are_made_again_only_where_an_address_or_a_rank_changed(monkeypatch):
    uploads, upload = [], _tables.upload
    monkeypatch.setattr(_tables, "upload", lambda *args: uploads.append(1) or upload(*args))
    g = [torch.randn(50), torch.randn(70)]
    for _ in range(3):
        fused.select([(g, 60)], torch.float32)
        g[0] += 1  # another value in the same place
    assert len(uploads) == 1
    keys, _ = fused.select([(g, 61)], torch.float32)
    assert len(uploads) == 2
    assert keys.equal(reference.select([(g, 61)], torch.float32)[0])
    moved = [g[0].clone(), g[1]]
    fused.select([(moved, 61)], torch.float32)
    assert len(uploads) == 3
    monkeypatch.setattr(_tables, "_KEPT", 2)
    for k in range(1, 6):
        fused.select([(g, k)], torch.float32)
    assert len(_tables._cache) == 2


def test_addresses_past_32_bits():
    """Elements behind the 2**31st of one allocation, of which few pages are ever touched."""
    far = 2**31 + 5
    try:
        whole = torch.empty(far + 1000, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    tail = whole[far:]
    tail.copy_(torch.randn(1000))
    pools = [([tail], 321)]
    want = reference.select([([tail.clone()], 321)], torch.float32)[0]
    assert fused.select(pools, torch.float32)[0].equal(want)
    theta, g_f = torch.randn(1000).half(), torch.randn(1000).half()
    out, *_ = combine([theta], [g_f], [tail], out=[tail])
    expected, *_ = combine([theta], [g_f], [tail.clone().copy_(tail)], kernels=reference)
    assert out[0] is tail
    assert not tail.isnan().any()
    assert len(expected) == 1


# -- in the package -------------------------------------------------------------------------------


def test_works_inside_compiled_code():
    def f(g):
        keys, _ = fused.select([([g * 2], 10)], torch.float32)
        return keys + 1

    g = torch.randn(50)
    want = reference.select([([g * 2], 10)], torch.float32)[0] + 1
    assert torch.compile(f, backend="eager")(g).equal(want)


def test_whole_optimizer_steps_as_with_plain_torch(monkeypatch):
    monkeypatch.setitem(kernels._FUSED, "cpu", "triton")
    kernels._fused.cache_clear()
    try:
        assert kernels.active("cpu") == "triton (fused)"
        torch.testing.assert_close(trained(fused=True), trained(fused=False))
    finally:
        kernels._fused.cache_clear()


def trained(fused):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3))
    opt = EBUOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), gamma=0.5, max_grad_norm=1.0,
        unrelated="freeze", fused=fused,
    )  # fmt: skip
    x, y = torch.randn(20, 7), torch.randn(20, 7)
    for _ in range(4):
        opt.step(
            forget=lambda: model(x).square().mean().neg().backward(),
            remember=lambda: model(y).square().mean().backward(),
        )
    return [p.detach() for p in model.parameters()]


def test_parameters_that_are_refused_say_why():
    assert fused.available() is None
    assert fused.takes([torch.ones(1)]) is None
    assert "float64" in fused.takes([torch.ones(1).double()])
    assert "2 devices" in fused.takes([torch.ones(1), torch.ones(1, device="meta")])
    assert "meta" in fused.takes([torch.ones(1, device="meta")])


def test_card_on_which_triton_fails_is_refused_with_the_reason(monkeypatch):
    """As a V100 would be by a Triton that cannot compile for it."""

    def broken(tensors):
        raise ValueError("sm_70 is not supported")

    fused._refuses.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(fused, "finite_probe", broken)
    assert "sm_70 is not supported" in fused._refuses(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert "cuda:1 has 6.1" in fused._refuses(torch.device("cuda", 1))
    fused._refuses.cache_clear()


def test_rank_of_an_empty_pool_is_an_error():
    with pytest.raises(ValueError, match="k must be in"):
        fused.select([([torch.ones(0)], rank(0, 0.5))], torch.float32)
