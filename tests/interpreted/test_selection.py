"""`_launch_selection`: one selection of all pools, whatever their tensors are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebu_optim.kernels import reference
from ebu_optim.kernels import triton as fused

from .. import oracle
from ..inputs import gradients, numpy, rank, total
from ..test_kernels import (  # noqa: F401
    test_masks_are_immune_to_flush_to_zero,
    test_nan_ranks_above_inf_and_all_nan_are_tied_whatever_their_bits,
    test_pools_are_ranked_apart_and_nonfinite_elements_counted,
    test_rank_outside_the_elements_is_an_error,
)
from .shared import slow


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


def test_copy_of_a_gradient_lives_until_it_is_read():
    """A layout that the kernels do not take is copied; its memory must not be used again yet."""
    x = torch.randn(40, 60)[:, ::2]
    want = reference.select([([x], 600)], torch.float32)[0]
    assert all(fused.select([([x], 600)], torch.float32)[0].equal(want) for _ in range(3))


def test_rank_of_an_empty_pool_is_an_error():
    with pytest.raises(ValueError, match="k must be in"):
        fused.select([([torch.ones(0)], rank(0, 0.5))], torch.float32)
