"""The figures of a step from the vector that the kernels add up."""

from __future__ import annotations

import math

import pytest
import torch

from ebu_optim import EBUOptimizer
from ebu_optim.kernels.contract import STATS
from ebu_optim.optim._stats import read_stats


def read(total: int = 100, **sums: float):
    vector = torch.tensor([sums.get(name, 0.0) for name in STATS], dtype=torch.float64)
    return read_stats((vector, torch.tensor([0.5, 0.25]), total))


def test_nothing_before_the_first_step():
    assert read_stats(None) == {}


def test_what_was_not_counted_is_not_shown():
    vector = torch.tensor([4.0 * (name == "update_sq") for name in STATS], dtype=torch.float64)
    shown = read_stats((vector, torch.tensor([0.5, 0.25]), 100), counted=False)
    assert shown == {"total": 100, "update_norm": 2.0, "thresholds": [0.5, 0.25]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"penalty": "none"}, {"unrelated": "freeze"}])
def test_steps_without_statistics_are_the_same_steps(dtype, options):
    def run(**more):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, dtype=dtype)) for n in (5, 1030)]
        opt = EBUOptimizer(torch.optim.Adam(params, lr=1e-2), max_grad_norm=1.0, **options, **more)
        for _ in range(3):
            for phase in (opt.forget, opt.remember):
                with phase():
                    for p in params:
                        p.grad = torch.randn_like(p)
            opt.step()
        return params, opt

    counted, a = run()
    without, b = run(stats=False)
    torch.testing.assert_close(without, counted, rtol=0, atol=0)
    assert b.stats == {name: a.stats[name] for name in ("total", "update_norm", "thresholds")}
    assert str(b.state_dict()) == str(a.state_dict())


def test_lift_is_the_overlap_over_chance():
    stats = read(forget_selected=50, remember_selected=40, overlap=30, overlap_opposed=12)
    assert stats["overlap_lift"] == pytest.approx(30 / (50 * 40 / 100))
    assert stats["overlap_opposed"] == pytest.approx(12 / 30)
    assert (stats["forget_selected"], stats["remember_selected"], stats["overlap"]) == (50, 40, 30)


def test_cosine_and_norms():
    stats = read(dot=3.0, forget_sq=9.0, remember_sq=4.0, update_sq=25.0)
    assert stats["cosine"] == pytest.approx(0.5)
    assert (stats["forget_norm"], stats["remember_norm"], stats["update_norm"]) == (3.0, 2.0, 5.0)


def test_shares_of_nothing_are_nan():
    stats = read()
    assert all(math.isnan(stats[n]) for n in ("overlap_lift", "overlap_opposed", "cosine"))


def test_moved_is_by_region_and_thresholds_are_a_list():
    stats = read(moved_overlap_sq=16.0, moved_unrelated_sq=1.0)
    assert stats["moved_overlap"] == 4.0
    assert stats["moved_unrelated"] == 1.0
    assert stats["moved_forget_only"] == stats["moved_remember_only"] == 0.0
    assert stats["thresholds"] == [0.5, 0.25]
