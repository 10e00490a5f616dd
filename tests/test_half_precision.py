"""Real autocast passes in float16 under GradScaler, and real overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ebu_optim import EBUOptimizer

from .halves import BASES, HALF, PHASES, START, autocast, loss, scaler_of
from .steps import assert_same, net, params, snapshot
from .twin import Twin, assert_near

BASE = pytest.mark.parametrize("name", BASES)


def wrapped(name: str = "adam_plain", **options) -> tuple[nn.Module, EBUOptimizer]:
    m = net()
    return m, EBUOptimizer(BASES[name](m.parameters()), **{"gamma": 3.0, **options})


def half_phase(
    scaler, opt, m, i: int, phase: str, rows: slice = slice(None), how: str = ""
) -> None:
    """One micro-batch in float16. It overflows, by itself, where `how` says so."""
    with getattr(opt, phase)():
        with autocast():
            value = loss(m, i, phase == "forget", rows, by=1e5 if how == "forward" else 1)
        value = value * (2.0**9 if how == "backward" else 1)
        (value if scaler is None else scaler.scale(value)).backward()


def half_step(scaler, opt, m, i: int, bad: tuple[str, ...] = (), how: str = "backward") -> None:
    for phase in PHASES:
        half_phase(scaler, opt, m, i, phase, how=how if phase in bad else "")
    if scaler is None:
        opt.step()
    else:
        scaler.step(opt)
        scaler.update()


# -- without an overflow ------------------------------------------------------------------------


@BASE
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1, "unrelated": "freeze"}], ids=["", "clip, freeze"]
)
def test_a_scale_that_is_a_power_of_two_leaves_no_trace(name, options):
    """Bit for bit the same passes without a scaler: nothing here is small enough to be lost."""
    m, opt = wrapped(name, **options)
    n, other = wrapped(name, **options)
    scaler, seen = scaler_of(growth_interval=2), []
    opt.base.register_step_pre_hook(
        lambda o, *_: seen.append((getattr(o, "grad_scale", None), getattr(o, "found_inf", None)))
    )
    for i in range(5):
        half_step(scaler, opt, m, i)
        half_step(None, other, n, i)
        assert_same(snapshot(opt, m), snapshot(other, n))
    assert scaler.get_scale() == 4 * START
    # a base with a scaling of its own is given unscaled gradients and nothing to undo
    assert seen == [(None, None)] * 5


@pytest.mark.parametrize("start", [2.0**8, 3.0**5, 1000.0])
@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_masks_thresholds_and_F_are_those_of_the_unscaled_gradients(start, update):
    """With a scale that is no power of two 1 / scale is rounded: equal to float32's rounding."""
    m = net()
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0, update=update)
    twin = Twin(list(m.parameters()), gamma=3.0, update=update)
    scaler = scaler_of(start, growth_factor=3.0, growth_interval=1)
    for i in range(3):
        scale, theta, grads = scaler.get_scale(), params(m), {}
        for phase in PHASES:
            half_phase(scaler, opt, m, i, phase)
            with getattr(opt, phase)():
                grads[phase] = [p.grad.double() / scale for p in m.parameters()]
        scaler.step(opt)
        scaler.update()
        assert scale == start * 3**i
        G, (m_f, m_r), taus = twin.step(theta, grads["forget"], grads["remember"])
        assert_near([p.grad for p in m.parameters()], G, scale=max(abs(g).max() for g in G))
        assert opt.stats["forget_selected"] == sum(f.sum() for f in m_f)
        assert opt.stats["remember_selected"] == sum(r.sum() for r in m_r)
        assert opt.stats["overlap"] == sum((f & r).sum() for f, r in zip(m_f, m_r))
        assert opt.stats["thresholds"] == pytest.approx(
            [t for pair in taus for t in pair], rel=1e-6
        )
        for p, F in zip(m.parameters(), twin.fisher):
            torch.testing.assert_close(
                opt.fisher_of(p).double(), torch.tensor(F), rtol=1e-5, atol=0
            )


@BASE
@pytest.mark.parametrize("scale", [START, 3.0**7])
def test_the_update_is_that_of_float32_within_the_rounding_of_half(name, scale):
    """Everything is selected, so that no rounding can carry a scalar over a threshold."""
    m, opt = wrapped(name, delta=1.0)
    n, other = wrapped(name, delta=1.0)
    half_step(scaler_of(scale), opt, m, 0)
    other.step(*(lambda f=f: loss(n, 0, f).backward() for f in (True, False)))
    eps = torch.finfo(HALF).eps
    for p, q in zip(m.parameters(), n.parameters()):
        assert not torch.equal(p.grad, q.grad)  # there is a rounding
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=2 * eps * q.grad.abs().max().item())
        assert torch.equal(opt.anchor_of(p), other.anchor_of(q))


def test_the_scale_saves_what_half_would_lose():
    """Losses 2**-24 times as large under a scale 2**24 times as large are the same run."""
    tiny = 2.0**-24

    def train(m, opt, scaler, by: float):
        for i in range(3):
            for phase in PHASES:
                with getattr(opt, phase)():
                    with autocast():
                        value = loss(m, i, phase == "forget") * by
                    scaler.scale(value).backward()
            scaler.step(opt)
            scaler.update()

    runs = {}
    for by, scale in ((1.0, 1.0), (tiny, 1 / tiny), (tiny, 1.0)):
        m = net()
        opt = EBUOptimizer(SGD(m.parameters(), lr=0.05 / by), gamma=3.0)
        train(m, opt, scaler_of(scale), by)
        runs[by, scale] = params(m), [opt.fisher_of(p) for p in m.parameters()]
    weights, fisher = runs[1.0, 1.0]
    assert_same(runs[tiny, 1 / tiny], (weights, [f * tiny**2 for f in fisher]))
    assert not torch.allclose(runs[tiny, 1.0][0][0], weights[0], rtol=0.01)


# -- overflows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd_plain", "adam_foreach", "adamw_fused", "sgd_fused"])
@pytest.mark.parametrize("bad", [("forget",), ("remember",), PHASES], ids="+".join)
@pytest.mark.parametrize("how", ["backward", "forward"])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.1, "unrelated": "freeze", "nonfinite": "skip"}]
)
def test_an_overflow_in_half_leaves_everything_as_it_was(name, bad, how, options):
    m, opt = wrapped(name, **options)
    scaler, stepped = scaler_of(), []
    opt.base.register_step_pre_hook(lambda *_: stepped.append(1))
    half_step(scaler, opt, m, 0)
    before = snapshot(opt, m)
    for phase in PHASES:
        half_phase(scaler, opt, m, 5, phase, how=how if phase in bad else "")
        with getattr(opt, phase)():
            finite = all(p.grad.isfinite().all() for p in m.parameters())
        assert finite == (phase not in bad)
    scaler.step(opt)
    scaler.update()
    assert (opt.skipped_steps, opt.last_step_skipped, stepped) == (1, True, [1])
    opt.skipped_steps = 0
    assert_same(snapshot(opt, m), before)
    assert scaler.get_scale() == START / 2

    n, other = wrapped(name, **options)
    for i in (0, 1, 2):
        half_step(scaler_of(START / 2), other, n, i)
    for i in (1, 2):
        half_step(scaler, opt, m, i)
    assert scaler.get_scale() == START / 2
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("order", [PHASES, PHASES[::-1]], ids="".join)
@pytest.mark.parametrize("how", ["backward", "forward"])
def test_an_overflow_in_one_of_two_micro_batches(phase, part, order, how):
    halves = slice(0, 3), slice(3, 6)

    def step(scaler, opt, m, i, bad=None):
        for j, rows in enumerate(halves):
            for each in order:
                half_phase(scaler, opt, m, i, each, rows, how if (each, j) == bad else "")
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    m, opt = wrapped("adamw_fused")
    n, other = wrapped("adamw_fused")
    scaler = scaler_of()
    step(scaler, opt, m, 0)
    before = snapshot(opt, m)
    step(scaler, opt, m, 5, (phase, part))
    assert (opt.skipped_steps, opt.last_step_skipped) == (1, True)
    opt.skipped_steps = 0
    assert_same(snapshot(opt, m), before)
    assert scaler.get_scale() == START / 2
    step(scaler, opt, m, 1)
    for i in range(2):
        step(scaler_of(START / 2), other, n, i)
    assert_same(snapshot(opt, m), snapshot(other, n))
