"""What is ranked together, and that a selection changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ebu_optim.optim._selection import select
from ebu_optim.optim._shards import Shards
from ebu_optim.optim._slots import Slots

SIZES = (12, 7, 30, 0)


def problem(*deltas):
    """Slots in groups with these deltas, and two gradients of each."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(n)) for n in SIZES]
    cut = len(params) // len(deltas)
    groups = [
        {"params": params[i * cut : (i + 1) * cut], "ebu_delta": d} for i, d in enumerate(deltas)
    ]
    g_f, g_r = ([torch.randn(n, generator=generator) for n in SIZES] for _ in "fr")
    return Slots(SimpleNamespace(param_groups=groups))(), g_f, g_r


def chosen(slots, g_f, g_r, granularity="model"):
    return select(slots, g_f, g_r, granularity=granularity, fused=False, shards=Shards(slots))


def kth(grads, delta):
    magnitudes = torch.cat([g.abs() for g in grads])
    k = max(1, math.floor(delta * len(magnitudes) + 0.5))
    return magnitudes.sort(descending=True).values[k - 1]


def thresholds(found):
    return found.taus.to(torch.int32).view(torch.float32)


def test_groups_with_one_delta_are_ranked_together():
    slots, g_f, g_r = problem(0.3, 0.3)
    found = chosen(slots, g_f, g_r)
    assert len(found.taus) == 2
    assert torch.equal(thresholds(found), torch.stack([kth(g_f, 0.3), kth(g_r, 0.3)]))
    assert found.total == sum(SIZES)


def test_a_group_with_another_delta_is_ranked_by_itself():
    slots, g_f, g_r = problem(0.3, (0.3, 0.6))
    found = chosen(slots, g_f, g_r)
    expected = [kth(g_f, 0.3), kth(g_r[:2], 0.3), kth(g_r[2:], 0.6)]
    assert torch.equal(thresholds(found), torch.stack(expected))
    assert found.pools == ([0, 0, 0, 0], [1, 1, 2, 0])


def test_ranking_inside_each_tensor():
    slots, g_f, g_r = problem(0.5)
    found = chosen(slots, g_f, g_r, granularity="tensor")
    for which, grads in enumerate((g_f, g_r)):
        for g, pool in zip(grads, found.pools[which], strict=True):
            if g.numel():
                assert thresholds(found)[pool] == kth([g], 0.5)


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_gradient_counts_as_zeros(missing):
    slots, g_f, g_r = problem(0.9)
    zeros = [torch.zeros_like(g) if i == missing else g for i, g in enumerate(g_f)]
    g_f[missing] = None
    found, expected = chosen(slots, g_f, g_r), chosen(slots, zeros, g_r)
    assert torch.equal(found.taus, expected.taus)


def test_nan_and_inf_are_counted_and_nothing_is_changed():
    slots, g_f, g_r = problem(0.5)
    g_f[0][:2], g_r[2][5] = float("nan"), float("inf")
    before = [g.clone() for g in (*g_f, *g_r)]
    assert chosen(slots, g_f, g_r).nonfinite.tolist() == [2, 1]
    for a, b in zip(before, (*g_f, *g_r), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
