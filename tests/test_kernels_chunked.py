"""The chunked kernels against the specification: bit for bit on masks, to rounding on G."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebu_optim.kernels import backend, chunked, reference

from . import test_combine
from .inputs import FINITE, combine, constants, gradients, numpy, rank, sizes, total
from .poison import poison  # noqa: F401

fast = settings(deadline=None, max_examples=60)


@fast
@given(make=gradients(), sizes=sizes, delta=st.sampled_from((1e-9, 0.1, 0.5, 1.0)))
def test_keys_and_counts_are_the_specifications_bit_for_bit(make, sizes, delta):
    grads = make()
    if total(grads) == 0:
        return
    dtype = reference.working_dtype(grads)
    pools = [(grads, rank(total(grads), delta)), (grads, 1)]
    with constants(sizes):
        got, want = (module.select(pools, dtype) for module in (chunked, reference))
    assert [t.tolist() for t in got] == [t.tolist() for t in want]
    assert got[0].dtype == want[0].dtype == torch.int64


@fast
@given(make=gradients(FINITE), sizes=sizes, options=test_combine.choices)
def test_held_scalars_are_the_specifications_and_the_update_to_rounding(make, sizes, options):
    if options["update"] == "routed":
        options |= {"terms": test_combine.oracle.TERMS}
    arrays = test_combine.problem(make)
    if total(arrays[0]) == 0:
        return
    online = [[f.clone() for f in arrays[4]] for _ in range(2)]
    with constants(sizes):
        (out, held, stats), (want, kept, sums) = (
            combine(*arrays[:4], fisher, **options, online=0.25, kernels=module)
            for module, fisher in zip((chunked, reference), online)
        )
    torch.testing.assert_close(held, kept, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(online[0], online[1], rtol=1e-6, atol=0)
    names = reference.STATS[:3]
    assert [stats[n] for n in names] == [sums[n] for n in names]
    theta, g_f, g_r, anchor, fisher = (numpy(a) for a in arrays)
    size = [
        2 * (abs(f) + abs(r)) + options["gamma"] * F * (abs(t) + abs(t0))
        for t, f, r, t0, F in zip(theta, g_f, g_r, anchor, fisher)
    ]
    test_combine.assert_rounded(out, [w.double().numpy() for w in want], size)


@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_update_is_finite_where_the_specifications_is(update):
    rng = np.random.default_rng(0)
    bad = np.where(rng.random((2, 300)) < 0.1, np.inf, rng.standard_normal((2, 300)))
    g_f, g_r = torch.tensor(np.where(rng.random((2, 300)) < 0.1, np.nan, bad)).float()
    results = [
        combine([torch.ones(300)], [g_f], [g_r], update=update, kernels=module)
        for module in (chunked, reference)
    ]
    (out, held, stats), (want, kept, sums) = results
    torch.testing.assert_close(held, kept, rtol=0, atol=0, equal_nan=True)
    assert out[0].isfinite().equal(want[0].isfinite())
    assert stats["update_nonfinite"] == sums["update_nonfinite"] > 0


def test_plain_kernels_are_what_fused_false_asks_for():
    assert backend([torch.ones(1)], False) is chunked
