"""GradScaler: both gradients are unscaled, an overflow in either skips the step exactly once."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ebu_optim import EBUOptimizer
from ebu_optim.kernels import chunked, cpu

from ..steps import assert_same, build, loss, net, params, run, snapshot

BASE = pytest.mark.parametrize("name", ["sgd", "adam", "adamw_fused"])
OVERFLOW = 1e38
WHERE = pytest.mark.parametrize(
    ("forget", "remember"), [(OVERFLOW, 1), (1, OVERFLOW), (OVERFLOW, OVERFLOW)]
)


def scaler_of(scale: float = 16.0, growth_interval: int = 1000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)


def backward(
    scaler, opt: EBUOptimizer, m: nn.Module, i: int, forget: float = 1, remember: float = 1
) -> None:
    with opt.forget():
        scaler.scale(loss(m, i, True) * forget).backward()
    with opt.remember():
        scaler.scale(loss(m, i, False) * remember).backward()


def step(scaler, opt: EBUOptimizer, m: nn.Module, i: int, *factors: float) -> None:
    backward(scaler, opt, m, i, *factors)
    scaler.step(opt)
    scaler.update()


def but_for_the_count(taken: dict) -> dict:
    for group in taken["state"]["param_groups"]:
        del group["ebu_skipped"]
    return taken


@BASE
@pytest.mark.parametrize("scale", [16.0, 2.0**16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "unrelated": "freeze"}])
def test_without_overflow_it_is_the_run_without_a_scaler(name, scale, options):
    m, opt = build(name, **options)
    n, other = build(name, **options)
    scaler = scaler_of(scale, growth_interval=2)
    for i in range(5):
        step(scaler, opt, m, i)
        run(other, n, range(i, i + 1))
        torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)
        for key in ("forget_selected", "remember_selected", "overlap", "total"):
            assert opt.stats[key] == other.stats[key]
        assert opt.stats["thresholds"] == pytest.approx(other.stats["thresholds"], rel=1e-5)
        for p, q in zip(m.parameters(), n.parameters(), strict=True):
            torch.testing.assert_close(opt.fisher_of(p), other.fisher_of(q), rtol=1e-5, atol=0)
    assert scaler.get_scale() == 4 * scale
    assert (opt.skipped_steps, opt.last_step_skipped) == (0, False)


@BASE
@WHERE
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_an_overflow_skips_the_step_and_shrinks_the_scale_once(name, forget, remember, nonfinite):
    m, opt = build(name, nonfinite=nonfinite)
    scaler = scaler_of()
    step(scaler, opt, m, 0)
    before = but_for_the_count(snapshot(opt, m))
    step(scaler, opt, m, 5, forget, remember)
    assert_same(but_for_the_count(snapshot(opt, m)), before)
    assert scaler.get_scale() == 8.0
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, True)

    for i in (1, 2):
        step(scaler, opt, m, i)
    assert scaler.get_scale() == 8.0
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, False)
    n, other = build(name, nonfinite=nonfinite)
    run(other, n, range(3))
    torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)


@WHERE
def test_an_overflow_at_the_very_first_step(forget, remember):
    m, opt = build()
    scaler = scaler_of()
    step(scaler, opt, m, 5, forget, remember)
    assert_same(params(m), params(net()))
    assert not opt.state
    assert opt.stats == {}
    assert scaler.get_scale() == 8.0
    step(scaler, opt, m, 0)
    assert not any(map(torch.equal, params(m), params(net())))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("phase", ["forget", "remember"])
def test_one_element_anywhere_is_enough(index, value, phase):
    m, opt = build()
    scaler = scaler_of()
    backward(scaler, opt, m, 0)
    with getattr(opt, phase)():
        list(m.parameters())[index].grad.view(-1)[-1] = value
    scaler.step(opt)
    scaler.update()
    assert_same(params(m), params(net()))
    assert opt.last_step_skipped
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("options", [{}, {"unrelated": "freeze"}, {"fused": False}])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
@WHERE
def test_a_scaler_that_comes_after_steps_without_one(forget, remember, nonfinite, options):
    """Its first step has no probe in param.grad, and looks at both gradients itself."""
    m, opt = build("adam", nonfinite=nonfinite, **options)
    n, other = build("adam", nonfinite=nonfinite, **options)
    run(opt, m, range(2))
    run(other, n, range(2))
    before = but_for_the_count(snapshot(opt, m))
    scaler = scaler_of()
    step(scaler, opt, m, 5, forget, remember)
    assert_same(but_for_the_count(snapshot(opt, m)), before)
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, True)
    scale = scaler.get_scale()  # the scaler has seen an overflow of the remember gradient alone
    assert scale == (16.0 if remember == 1 else 8.0)
    step(scaler, opt, m, 5, forget, remember)
    assert_same(but_for_the_count(snapshot(opt, m)), before)
    assert opt.skipped_steps == 2
    assert scaler.get_scale() == scale / 2
    step(scaler, opt, m, 2)
    run(other, n, range(2, 3))
    assert not opt.last_step_skipped
    torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)


def test_the_hidden_gradient_is_probed_where_a_scaler_may_be_in_use(monkeypatch):
    probed = []
    for module in (chunked, cpu):
        probe = module.finite_probe
        monkeypatch.setattr(module, "finite_probe", lambda t, p=probe: probed.append(1) or p(t))
    m, opt = build()
    scaler = scaler_of()

    def probes(take, *arguments):
        probed.clear()
        take(*arguments)
        return bool(probed)

    assert probes(run, opt, m, range(1))  # who knows what comes
    assert not probes(run, opt, m, range(1, 3))
    assert not probes(step, scaler, opt, m, 3)
    assert probes(step, scaler, opt, m, 4)
    assert probes(run, opt, m, range(5, 6))
    assert not probes(run, opt, m, range(6, 7))
    m, opt = copy.deepcopy((m, opt))
    assert probes(run, opt, m, range(7, 8))


def test_several_overflows_and_growth():
    m, opt = build()
    n, other = build()
    scaler = scaler_of(growth_interval=2)
    scales = []
    for i, factor in enumerate((OVERFLOW, 1, 1, OVERFLOW, OVERFLOW, 1, 1, 1)):
        step(scaler, opt, m, i, factor)
        if factor == 1:
            run(other, n, range(i, i + 1))
        scales.append(scaler.get_scale())
    assert scales == [8, 8, 16, 8, 4, 4, 8, 8]
    assert opt.skipped_steps == 3
    torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)


@BASE
@pytest.mark.parametrize("clip", [True, False])
def test_unscale_between_the_phases_and_the_step(name, clip):
    m, opt = build(name)
    scaler = scaler_of()
    backward(scaler, opt, m, 5)
    scaler.unscale_(opt)
    if clip:
        clip_grad_norm_(m.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"unscale_\(\).*max_grad_norm"):
        scaler.step(opt)
    assert_same(params(m), params(net()))
    scaler.update()

    n, other = build(name)
    for i in range(2):
        step(scaler, opt, m, i)
    run(other, n, range(2))
    torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("what", ["clipping", "in place", "backward", "zero_grad"])
def test_a_change_between_the_phases_and_the_step_without_unscaling(what):
    m, opt = build()
    scaler = scaler_of()
    backward(scaler, opt, m, 5)
    if what == "clipping":
        clip_grad_norm_(m.parameters(), 1.0)
    elif what == "in place":
        m[0].weight.grad.mul_(2)
    elif what == "backward":
        scaler.scale(loss(m, 5, True)).backward()
    else:
        m.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        scaler.step(opt)
    assert_same(params(m), params(net()))


@pytest.mark.parametrize("what", ["a phase is missing", "alpha is out of range", "in place"])
@pytest.mark.parametrize("then", ["the scaler", "no scaler"])
def test_an_error_inside_scaler_step_leaves_no_scale_behind(what, then):
    m, opt = build("sgd")
    scaler = scaler_of()
    backward(scaler, opt, m, 5)
    if what == "a phase is missing":
        opt.zero_grad()
        with opt.remember():
            scaler.scale(loss(m, 5, False)).backward()
    elif what == "alpha is out of range":
        opt.param_groups[0]["ebu_alpha"] = 2.0
    else:
        m[0].weight.grad.mul_(2)
    with pytest.raises((RuntimeError, ValueError), match=r"phase|alpha"):
        scaler.step(opt)
    scaler.update()
    opt.alpha = 0.6
    opt.zero_grad()
    assert_same(params(m), params(net()))

    n, other = build("sgd")
    for i in range(2):
        if then == "the scaler":
            step(scaler, opt, m, i)
        else:
            run(opt, m, range(i, i + 1))
    run(other, n, range(2))
    torch.testing.assert_close(params(m), params(n), rtol=1e-6, atol=1e-8)


def half(**options):
    m = net(torch.float16)
    return m, EBUOptimizer(torch.optim.SGD(m.parameters(), lr=0.05), gamma=3.0, **options)


def test_half_precision_parameters():
    m, opt = half()
    n, other = half()
    scaler = scaler_of()
    for i in range(3):
        step(scaler, opt, m, i)
        run(other, n, range(i, i + 1))
    torch.testing.assert_close(params(m), params(n), rtol=2e-2, atol=2e-3)
    before = params(m)
    for factors in ((OVERFLOW, 1), (1, OVERFLOW)):
        step(scaler, opt, m, 3, *factors)
        assert opt.last_step_skipped
    assert_same(params(m), before)
    assert scaler.get_scale() == 4.0


def test_the_largest_half_is_no_overflow():
    m, opt = half(max_grad_norm=1.0)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    for phase in (opt.forget, opt.remember):
        with phase():
            for p in m.parameters():
                p.grad = torch.full_like(p, 65504.0)
    scaler.step(opt)
    scaler.update()
    assert not opt.last_step_skipped
    assert scaler.get_scale() == 16.0
    assert all(p.isfinite().all() for p in m.parameters())
