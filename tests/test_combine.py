"""Combination against the NumPy oracle: G to rounding, sums, Fisher, what is held, memory."""

from __future__ import annotations

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebu_optim.kernels import chunked, reference
from ebu_optim.kernels.contract import Columns, Update, Weights

from . import oracle
from .inputs import (
    ADDED,
    FINITE,
    REAL,
    TINY,
    assert_masks,
    combine,
    constants,
    every_backend,
    fill,
    gradients,
    lay_out,
    numpy,
    sizes,
    total,
)
from .poison import poison  # noqa: F401


def assert_rounded(got, want, size):
    """`size` bounds the terms that add up to `want`: rounding is relative to it, not to the sum."""
    work = torch.finfo(reference.working_dtype(got))
    for g, w, s in zip(got, want, size, strict=True):
        own = torch.finfo(g.dtype)
        bound = 16 * work.eps * (s + work.smallest_normal)
        bound = bound + own.eps * (abs(w) + own.smallest_normal)
        error = np.where(abs(w) > own.max * (1 - own.eps), 0, abs(g.double().numpy() - w))
        assert (error <= bound).all(), (g.dtype, error.max(), g, w)


choices = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from((0.0, 0.3, 0.6, 1.0)),
        "gamma": st.sampled_from((0.0, 0.7, 30.0)),
        "penalty": st.sampled_from(("partial", "full", "none")),
        "update": st.sampled_from(("added", "replaced", "routed")),
        "terms": st.sets(st.sampled_from(oracle.TERMS), min_size=1),
        "delta": st.tuples(*[st.sampled_from((0.05, 0.5, 0.8, 1.0))] * 2),
    }
)


def problem(make):
    """theta, g_f, g_r, theta0 and F."""
    theta, g_f, g_r, anchor = make("normal"), make(), make(), make("normal")
    wide = [torch.float64 if t.dtype == torch.float64 else torch.float32 for t in theta]
    fisher = [f.abs().to(w) for f, w in zip(make("normal"), wide)]
    return theta, g_f, g_r, anchor, fisher


def against_the_oracle(arrays, got, options, anchored=True):
    out, held, stats = got
    theta, g_f, g_r, anchor, fisher = (numpy(a) for a in arrays)
    if not anchored:
        anchor = fisher = None
    want, (m_f, m_r), _ = oracle.step(
        theta, g_f, g_r, anchor, fisher, fisher_scale="raw", **options
    )
    gamma = options["gamma"] if anchored else 0.0
    moved = [t - t0 for t, t0 in zip(theta, anchor or theta)]
    size = [
        2 * (abs(f) + abs(r)) + gamma * F * (abs(t) + abs(t0))
        for t, f, r, t0, F in zip(theta, g_f, g_r, anchor or theta, fisher or theta)
    ]
    assert_rounded(out, want, size)
    assert_masks(held, arrays[0], [f | r for f, r in zip(m_f, m_r)])

    flat = lambda arrays: np.concatenate([a.ravel() for a in arrays])  # noqa: E731
    m_f, m_r, g_f, g_r, moved, want, size = map(flat, (m_f, m_r, g_f, g_r, moved, want, size))
    exact = {
        "forget_selected": m_f.sum(),
        "remember_selected": m_r.sum(),
        "overlap": (m_f & m_r).sum(),
    }
    assert {name: stats[name] for name in exact} == exact
    opposed = m_f & m_r & (np.sign(g_f) * np.sign(g_r) < 0)
    tiny = opposed & (abs(g_f * g_r) < 1e-44)  # these have a test of their own
    assert opposed.sum() - tiny.sum() <= stats["overlap_opposed"] <= opposed.sum()
    regions = {
        "forget_only": m_f & ~m_r,
        "remember_only": m_r & ~m_f,
        "overlap": m_f & m_r,
        "unrelated": ~m_f & ~m_r,
    }
    sums = {f"moved_{name}_sq": (moved[m] ** 2).sum() for name, m in regions.items()}
    sums |= {"forget_sq": g_f @ g_f, "remember_sq": g_r @ g_r, "update_sq": want @ want}
    bound = 1e-4 * (moved @ moved + 1) + 1e-5 * sum(sums.values())
    error = 2**-20 * size  # of G, see assert_rounded
    bounds = dict.fromkeys(("forget_sq", "remember_sq"), 0)
    bounds["update_sq"] = error @ (2 * abs(want) + error)
    for name, expected in sums.items():
        assert stats[name] == pytest.approx(expected, rel=1e-5, abs=bounds.get(name, bound) + 1e-37)
    assert stats["dot"] == pytest.approx(g_f @ g_r, abs=1e-5 * (abs(g_f) @ abs(g_r)) + 1e-38)


@every_backend
@settings(deadline=None, max_examples=250)
@given(make=gradients(FINITE), sizes=sizes, options=choices, anchored=st.booleans())
def test_combination_and_sums_are_the_oracles(kernels, make, sizes, options, anchored):
    if options["update"] == "routed":
        options |= {"terms": oracle.TERMS}
    arrays = problem(make)
    if total(arrays[0]) == 0:
        return
    before = [[t.clone() for t in a] for a in arrays]
    with constants(sizes):
        got = combine(*arrays[:3], *(arrays[3:] if anchored else ()), **options, kernels=kernels)
    against_the_oracle(arrays, got, options, anchored)
    for tensors, copies in zip(arrays, before):
        for t, c in zip(tensors, copies):
            torch.testing.assert_close(t, c, rtol=0, atol=0)


@every_backend
@pytest.mark.parametrize("delta", [None, (0.3, 0.6)])
@pytest.mark.parametrize("penalty", ["partial", "full", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_sum_has_any_weights_and_masks_that_may_be_empty(kernels, delta, penalty, dtype):
    rng = np.random.default_rng(0)
    shapes = ((40,), (3, 5), (1,), ())
    theta, g_f, g_r, anchor, fisher = arrays = problem(
        lambda kind="normal": [fill(kind, shape, dtype, rng) for shape in shapes]
    )
    weights = Weights(-1.5, 0.25, 2.0, -0.5, 0.75, penalty)
    out, _, stats = combine(*arrays, delta=delta, weights=weights, gamma=3.0, kernels=kernels)
    theta, g_f, g_r, anchor, fisher = (numpy(a) for a in arrays)
    masks = [[np.zeros(g.shape, bool) for g in g_f]] * 2
    if delta is not None:
        masks = [oracle.select(g, [d] * 4)[0] for g, d in zip((g_f, g_r), delta, strict=True)]
    want, size = [], []
    for t, f, r, t0, F, m_f, m_r in zip(theta, g_f, g_r, anchor, fisher, *masks, strict=True):
        only_r, both = m_r & ~m_f, m_f & m_r
        p = 3 * F * (t - t0) * {"partial": only_r, "full": 1, "none": 0}[penalty]
        masked = 2 * m_f * f - 0.5 * only_r * r + 0.75 * both * (r - f)
        want.append(-1.5 * f + 0.25 * r + masked + p)
        size.append(5 * (abs(f) + abs(r)) + 3 * F * (abs(t) + abs(t0)))
    assert_rounded(out, want, size)
    selected = [sum(int(m.sum()) for m in ms) for ms in masks]
    assert [stats["forget_selected"], stats["remember_selected"]] == selected
    moved = [stats[f"moved_{name}_sq"] for name in ("forget_only", "remember_only", "overlap")]
    assert any(moved) == (delta is not None)
    assert sum(moved) + stats["moved_unrelated_sq"] == pytest.approx(
        sum(((t - t0) ** 2).sum() for t, t0 in zip(theta, anchor, strict=True)), rel=1e-5
    )
    dot = sum((f * r).sum() for f, r in zip(g_f, g_r, strict=True))
    assert stats["dot"] == pytest.approx(dot, abs=1e-4)


@every_backend
def test_opposed_share_counts_signs_also_where_the_product_underflows(kernels):
    g_f, g_r = [torch.tensor([1e-30, -1e-30, 1e-30])], [torch.tensor([-1e-30, 1e-30, 1e-30])]
    _, _, stats = combine([torch.ones(3)], g_f, g_r, delta=(1.0, 1.0), kernels=kernels)
    assert stats["overlap"] == 3
    assert stats["overlap_opposed"] == 2


# -- properties ---------------------------------------------------------------------------------


def normal(n, *, count=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(n, generator=g).to(dtype) for _ in range(count)]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=12),
    order=st.randoms(use_true_random=False),
    chunk=st.integers(1, 300),
)
@every_backend
@settings(deadline=None, max_examples=40)
def test_result_is_a_function_of_values_not_of_order_splitting_or_chunk(
    kernels, cuts, order, chunk
):
    whole = [t.div(0.25).round().mul(0.25) for t in normal(200)]  # with ties
    whole[4].abs_()
    (G,), (held,), stats = combine(*([t] for t in whole), delta=(0.3, 0.6), kernels=kernels)
    where = list(range(200))
    order.shuffle(where)
    back = torch.tensor(where).argsort()
    edges = [0, *sorted(cuts), 200]
    parts = [[t[where][a:b] for a, b in pairwise(edges)] for t in whole]
    with constants({"CHUNK_CPU": chunk, "CAPACITY": chunk}):
        out, kept, sums = combine(*parts, delta=(0.3, 0.6), kernels=kernels)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(torch.cat(kept)[back], held, **same)
    torch.testing.assert_close(torch.cat(out)[back], G)
    assert sums == pytest.approx(stats, rel=1e-5)


@every_backend
@pytest.mark.parametrize("values", [REAL, TINY])
def test_output_may_be_the_remember_gradient_and_held_the_forget_gradient(kernels, values):
    theta, g_f, g_r, anchor, fisher = ([t.view(4, -1).mT] for t in normal(60))
    fresh = combine(theta, g_f, g_r, anchor, fisher, kernels=kernels)
    with constants(values):
        in_place = combine(theta, g_f, g_r, anchor, fisher, out=g_r, held=g_f, kernels=kernels)
    assert in_place[0] is g_r
    for got, want in zip(in_place[:2], fresh[:2]):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_backend
@pytest.mark.parametrize("values", [REAL, TINY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_online_fisher_is_the_mean_of_the_squares_and_used_before_it_is_updated(
    kernels, values, dtype
):
    theta, _, _, anchor, _ = normal(50, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher, squares = torch.zeros(50, dtype=wide), np.zeros(50)
    for n in range(4):
        g_f, g_r = normal(51 + n, count=2, dtype=dtype)
        arrays = [theta], [g_f[:50]], [g_r[:50]], [anchor], [fisher]
        used = [[t.clone() for t in a] for a in arrays]
        options = {"gamma": 0.5, "alpha": 0.6, "delta": (0.5, 0.5)}
        with constants(values):
            got = combine(*arrays, online=1 / (n + 1), **options, kernels=kernels)
        against_the_oracle(used, got, options)
        squares += g_r[:50].double().numpy() ** 2
        np.testing.assert_allclose(fisher.double().numpy(), squares / (n + 1), rtol=1e-5)
        assert got[2]["fisher_sum"] == pytest.approx(fisher.double().sum().item(), rel=1e-5)


@every_backend
@pytest.mark.parametrize("values", [REAL, TINY])
def test_restore_puts_back_the_unrelated_scalars_and_no_others(kernels, values):
    theta, g_f, g_r, *_ = ([a.view(5, -1), b] for a, b in zip(normal(60), normal(7)))
    theta[0] = theta[0].t().contiguous().t()
    old = [t.clone() for t in theta]
    _, (m_f, m_r), _ = oracle.step(*(numpy(a) for a in (theta, g_f, g_r)), None, None)
    with constants(values):
        _, held, _ = combine(theta, g_f, g_r, kernels=kernels)
        for t in theta:
            t += 1
        kernels.restore([*theta, old[0]], [*held, None])
    for t, o, f, r in zip(theta, old, m_f, m_r):
        assert torch.equal(t, torch.where(torch.tensor(f | r), o + 1, o))


@every_backend
def test_scaling(kernels):
    tensors = normal(5, count=2) + [torch.ones(2).double()]
    want = [t * 0.5 for t in tensors]
    kernels.scale(tensors, torch.tensor(0.5))
    assert all(torch.equal(t, w) for t, w in zip(tensors, want))


@every_backend
@pytest.mark.parametrize("values", [REAL, TINY])
@pytest.mark.parametrize("factor", [2.0**-16, 1 / 3.0])
def test_loss_scale_is_undone_before_all_but_the_selection(kernels, values, factor):
    arrays = [[t.view(4, -1).mT] for t in normal(60)]
    scaled = [[t / factor for t in column] for column in arrays[1:3]]
    fishers = [[arrays[4][0].abs()] for _ in range(2)]
    with constants(values):
        out, held, stats = combine(
            arrays[0],
            *scaled,
            arrays[3],
            fishers[0],
            online=0.5,
            inv_scale=torch.tensor(factor),
            kernels=kernels,
        )
        rounded = [[t * torch.tensor(factor) for t in column] for column in scaled]
        want = combine(arrays[0], *rounded, arrays[3], fishers[1], online=0.5, kernels=kernels)
    for got, expected in zip((out, held, fishers[0]), (want[0], want[1], fishers[1])):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert stats == want[2]


@every_backend
@pytest.mark.parametrize("values", [REAL, TINY])
@pytest.mark.parametrize(("t0", "F"), [("bfloat16", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor_and_fisher_may_be_held_in_other_dtypes_than_the_parameters(
    kernels, values, t0, F, dtype
):
    theta, g_f, g_r, anchor, fisher = ([t.to(dtype)] for t in normal(60))
    anchor = [anchor[0].to(getattr(torch, t0))]
    fisher = [fisher[0].abs().to(getattr(torch, F))]
    arrays = theta, g_f, g_r, anchor, fisher
    used = [[t.clone() for t in a] for a in arrays]
    options = {"gamma": 0.5, "alpha": 0.6, "delta": (0.5, 0.5)}
    with constants(values):
        got = combine(*arrays, online=0.25, **options, kernels=kernels)
    against_the_oracle(used, got, options)
    old, square = used[4][0].double(), g_r[0].double() ** 2
    want = (old + 0.25 * (square - old)).to(fisher[0].dtype)
    torch.testing.assert_close(fisher[0], want, rtol=2 * torch.finfo(want.dtype).eps, atol=1e-6)


@every_backend
@pytest.mark.parametrize(("dtype", "big"), [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_elements_of_the_update_that_its_dtype_does_not_hold_are_counted(kernels, dtype, big):
    g = torch.tensor([big, 1.0, -big, 2.0, big]).to(dtype)
    _, _, stats = combine([torch.zeros(5).to(dtype)], [g], [g.clone()], kernels=kernels)
    assert stats["update_nonfinite"] == 3
    _, _, stats = combine([torch.zeros(5).to(dtype)], [g / 8], [g / 8], kernels=kernels)
    assert stats["update_nonfinite"] == 0
    assert stats["update_sq"] == pytest.approx(3 * (3 / 8 * big) ** 2, rel=1e-3)  # past float32


# -- memory -------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The numel of the largest new tensor, and of all that live at once; `inputs` are not new."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.largest = self.peak = 0
        self.live = {}  # by address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.live = {at: (r, n) for at, (r, n) in self.live.items() if r() is not None}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                at, n = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()
                if n and at not in self.known:
                    self.live.setdefault(at, (weakref.ref(t), n // t.element_size()))
        numels = [n for _, n in self.live.values()]
        self.largest, self.peak = max([self.largest, *numels]), max(self.peak, sum(numels))
        return result


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "mixed", "many"])
@pytest.mark.parametrize("n", [1 << 11, 1 << 13])
def test_temporaries_are_bounded_by_the_constants_whatever_the_number_of_scalars(layout, n):
    """As the module promises: one chunk, or CAPACITY candidates, or the sample; never N."""
    values = {"CHUNK_CPU": 100, "CAPACITY": 150, "SAMPLE_MIN": 200, "SAMPLE_MAX": 200}
    columns = [[t.view(64, -1)] for t in normal(n)]
    if layout == "many":
        columns = [list(t[0].view(-1).split(n // 32)) for t in columns]
    elif layout != "contiguous":
        columns = [
            [lay_out(c[0], "transposed" if layout == "mixed" and i % 2 else layout)]
            for i, c in enumerate(columns)
        ]
    theta, g_f, g_r, *_ = columns
    out, held = ([torch.empty_like(t) for t in theta] for _ in range(2))
    known = [t for c in (*columns, out, held) for t in c]
    with constants(values):
        with Memory(*known) as selection:
            taus, _ = chunked.select([(g, n // 3) for g in (g_f, g_r)], torch.float32)
        with Memory(*known) as combination:
            chunked.combine(
                Columns(*columns, out, held, [0] * len(theta), [1] * len(theta)),
                taus,
                Update(ADDED, 1.0, 0.5, None, torch.float32),
                torch.zeros(len(reference.STATS), dtype=torch.float64),
            )
            chunked.restore(theta, held)
    assert 0 < combination.largest <= 100
    assert combination.peak <= 30 * 100
    assert 100 <= selection.largest <= 2 * 200  # two coordinates of each sample
    assert selection.peak <= 8 * 200
