"""`_triton_combination` and what launches it: G, its sums, F, and what is held and restored."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from ebu_optim.kernels import chunked, reference
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels._triton_combination import mixed, online_fisher
from ebu_optim.kernels.contract import Weights

from .. import inputs, oracle, test_combine
from ..inputs import fill, gradients, lay_out, total
from ..test_combine import (  # noqa: F401
    test_anchor_and_fisher_may_be_held_in_other_dtypes_than_the_parameters,
    test_loss_scale_is_undone_before_all_but_the_selection,
    test_online_fisher_is_the_mean_of_the_squares_and_used_before_it_is_updated,
    test_opposed_share_counts_signs_also_where_the_product_underflows,
    test_output_may_be_the_remember_gradient_and_held_the_forget_gradient,
    test_restore_puts_back_the_unrelated_scalars_and_no_others,
    test_scaling,
    test_sum_has_any_weights_and_masks_that_may_be_empty,
)
from .shared import TAKEN, combine, same, slow


@triton.jit
def mixed_kernel(g_f, g_r, m_f, m_r, out, on_f, on_r, on_m, on_only_r, blend):
    offs = tl.arange(0, 64)
    f, r = tl.load(m_f + offs), tl.load(m_r + offs)
    of_f, of_r = tl.load(g_f + offs), tl.load(g_r + offs)
    g = mixed(of_f, of_r, f, f * r, r - f * r, on_f, on_r, on_m, on_only_r, blend)
    tl.store(out + offs, g)


@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
@pytest.mark.parametrize("terms", [(True,) * 3, (False, True, True), (True, False, False)])
def test_mixture_is_that_of_the_weights(update, terms):
    *numbers, _ = Weights.reading(alpha=0.6, penalty="none", update=update, terms=terms)
    on_f, on_r, on_m, only_r, blend = numbers
    generator = torch.Generator().manual_seed(0)
    g_f, g_r = torch.randn(2, 64, generator=generator)
    m_f, m_r = torch.randint(0, 2, (2, 64), generator=generator).float()
    out = torch.empty(64)
    mixed_kernel[(1,)](g_f, g_r, m_f, m_r, out, *numbers)
    both = m_f * m_r
    want = on_f * g_f + on_r * g_r + on_m * m_f * g_f + only_r * (m_r - both) * g_r
    torch.testing.assert_close(out, want + blend * both * (g_r - g_f))


@triton.jit
def fisher_kernel(fisher, g_r, online, new):
    offs = tl.arange(0, 64)
    tl.store(new + offs, online_fisher(tl.load(fisher + offs), tl.load(g_r + offs), online))


@pytest.mark.parametrize("online", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_online_fisher_is_torchs_lerp_with_exact_ends(online):
    fisher, g_r = torch.rand(64), torch.randn(64)
    new = torch.empty(64)
    fisher_kernel[(1,)](fisher, g_r, online, new)
    torch.testing.assert_close(new, torch.lerp(fisher, g_r * g_r, online))
    if online in (0.0, 1.0):
        same(new, g_r * g_r if online else fisher)


@slow
@given(
    make=gradients(inputs.FINITE),
    options=test_combine.choices,
    anchored=st.booleans(),
    online=st.sampled_from((None, 0.3, 1.0)),
)
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
