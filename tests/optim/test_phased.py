"""Phases used wrongly: an error that says what was expected, and no harm done."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ebu_optim import EBUOptimizer
from ebu_optim.optim import _checks

from ..steps import (
    assert_as_if_nothing_had_happened,
    assert_same,
    build,
    closures,
    loss,
    net,
    params,
    phases,
    run,
    snapshot,
)


@pytest.mark.parametrize("phase", ["forget", "remember"])
@pytest.mark.parametrize("after", ["nothing", "a step", "zero_grad"])
def test_a_gradient_that_belongs_to_no_phase(phase, after):
    m, opt = build()
    n, other = build()
    steps = 0 if after == "nothing" else 1
    run(opt, m, range(steps))
    if after == "zero_grad":
        opt.zero_grad()
    loss(m, 5, True).backward()
    before = snapshot(opt, m)
    with pytest.raises(RuntimeError, match=rf"before {phase}\(\).*zero_grad\(\)"):
        getattr(opt, phase)().__enter__()
    assert_same(snapshot(opt, m), before)
    opt.zero_grad()
    run(opt, m, range(steps, 3))
    run(other, n, range(3))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_zeros_left_on_the_parameters_are_no_gradient():
    m, opt = build()
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize("outer", ["forget", "remember"])
@pytest.mark.parametrize("inner", ["forget", "remember"])
def test_phases_do_not_nest(outer, inner):
    m, opt = build()
    for name in ("forget", "remember"):
        with getattr(opt, name)():
            if name == outer:
                with pytest.raises(RuntimeError, match=rf"{inner}\(\) inside {outer}\(\)"):
                    getattr(opt, inner)().__enter__()
                with pytest.raises(RuntimeError, match=rf"step inside {outer}\(\)"):
                    opt.step()
            loss(m, 0, name == "forget").backward()
    opt.step()
    n, other = build()
    run(other, n, range(1))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("missing", ["forget", "remember", "both"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_phase_that_is_missing_or_made_no_gradient(missing, how):
    m, opt = build()
    for name in ("forget", "remember"):
        left_out = missing in (name, "both")
        if left_out and how == "missing":
            continue
        with getattr(opt, name)():
            if not left_out:
                loss(m, 0, name == "forget").backward()
    which = "forget" if missing == "both" else missing
    what = "is missing" if how == "missing" else "made no gradient"
    with pytest.raises(RuntimeError, match=rf"the {which} phase {what}.*backward"):
        opt.step()
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize("which", [0, 1])
def test_a_closure_that_does_not_call_backward(which):
    m, opt = build()
    pair = list(closures(m))
    pair[which] = lambda: loss(m, 0, True)
    name = ("forget", "remember")[which]
    with pytest.raises(RuntimeError, match=f"the {name} phase made no gradient.*backward"):
        opt.step(*pair)
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize("backward", [True, False])
def test_a_closure_by_name_after_the_phases(backward):
    """Lightning's manual optimization passes one that does nothing."""
    m, opt = build()
    if backward:
        phases(opt, m)
        with pytest.raises(RuntimeError, match="outside the phases"):
            opt.step(closure=lambda: loss(m, 0, True).backward())
        assert_as_if_nothing_had_happened(opt, m)
        return
    for i in range(2):
        phases(opt, m, i)
        opt.step(closure=lambda: None)
    n, other = build()
    run(other, n, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize(
    "names", [("forget",), ("remember",), ("closure",), ("forget", "remember", "closure")]
)
def test_a_single_closure(names):
    m, opt = build()

    def never():
        raise AssertionError

    with pytest.raises(TypeError, match=r"two closures.*phases.*Lightning"):
        opt.step(**dict.fromkeys(names, never))
    with pytest.raises(TypeError, match="two closures"):
        opt.step(never)
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("late", [True, False])
def test_an_exception_in_a_closure_or_a_phase(error, which, late):
    def failing(closure):
        def run_one():
            if late:
                closure()
            raise error("mine")

        return run_one

    m, opt = build()
    pair = list(closures(m))
    pair[which] = failing(pair[which])
    with pytest.raises(error, match="mine"):
        opt.step(*pair)
    assert_as_if_nothing_had_happened(opt, m)

    m, opt = build()
    pair = list(closures(m))
    pair[which] = failing(pair[which])
    with pytest.raises(error, match="mine"):  # noqa: PT012
        with opt.forget():
            pair[0]()
        with opt.remember():
            pair[1]()
    opt.zero_grad()
    assert_as_if_nothing_had_happened(opt, m)


def test_a_base_that_refuses_to_step():
    m, opt = build("schedulefree", "none")
    opt.eval()
    phases(opt, m)
    with pytest.raises(Exception, match="train"):
        opt.step()
    opt.train()
    run(opt, m, range(2))
    n, other = build("schedulefree", "none")
    run(other, n, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


MEDDLING = {
    "in place": lambda m: m[0].weight.grad.mul_(2),
    "in place, the last": lambda m: m[2].bias.grad.add_(1),
    "clipped": lambda m: clip_grad_norm_(m.parameters(), 1e-3),
    "clipped to no effect": lambda m: clip_grad_norm_(m.parameters(), 1e9),
    "clipped by value": lambda m: clip_grad_value_(m.parameters(), 1e-3),
    "cleared": lambda m: m.zero_grad(),
    "zeroed": lambda m: m.zero_grad(set_to_none=False),
    "one cleared": lambda m: setattr(m[0].weight, "grad", None),
    "replaced": lambda m: setattr(m[0].weight, "grad", m[0].weight.grad.clone()),
    "backward": lambda m: loss(m, 3, True).backward(),
}


@pytest.mark.parametrize("then", ["step", "forget", "remember"])
@pytest.mark.parametrize("what", MEDDLING)
def test_a_gradient_changed_between_the_phases_and_the_step(what, then):
    m, opt = build()
    phases(opt, m)
    MEDDLING[what](m)
    with pytest.raises(RuntimeError, match=r"changed outside the phases.*max_grad_norm"):
        opt.step() if then == "step" else getattr(opt, then)().__enter__()
    assert_as_if_nothing_had_happened(opt, m)


def test_a_backward_pass_between_the_two_phases():
    m, opt = build()
    with opt.forget():
        loss(m, 0, True).backward()
    loss(m, 0, False).backward()
    with pytest.raises(RuntimeError, match="changed outside the phases"):
        opt.remember().__enter__()
    assert_as_if_nothing_had_happened(opt, m)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({}, False),
        ({"nonfinite": "propagate"}, False),
        ({"nonfinite": "skip", "fisher": None}, False),
        ({"nonfinite": "propagate", "fisher": None}, True),
        ({"nonfinite": "propagate", "penalty": "none"}, True),
    ],
)
def test_a_step_that_a_cuda_graph_would_replay_wrongly_is_an_error(monkeypatch, options, right):
    m = net()
    opt = EBUOptimizer(torch.optim.SGD(m.parameters(), lr=0.1), **options)
    phases(opt, m)
    monkeypatch.setattr(_checks, "capturing", lambda: True)
    before = params(m)
    if right:
        opt.step()
        assert not torch.equal(before[0], next(m.parameters()))
    else:
        with pytest.raises(RuntimeError, match=r"CUDA graph needs nonfinite=\"propagate\""):
            opt.step()
        assert_same(before, params(m))
