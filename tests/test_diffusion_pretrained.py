"""The teacher that `anchored` makes of theta0 is the model as it was, or there is none."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ebu_optim import EBUOptimizer
from ebu_optim.diffusion import anchored

from .steps import net, run

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))


def normed() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).train()


def test_the_teacher_has_the_statistics_of_the_pretrained_model():
    m = normed()
    frozen = copy.deepcopy(m).eval()
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.1))
    teacher = anchored(m, opt)
    run(opt, m, range(3))
    assert not torch.allclose(m[1].running_mean, frozen[1].running_mean)
    moved = m[1].running_mean.clone()
    torch.testing.assert_close(teacher(X), frozen(X))
    assert torch.equal(m[1].running_mean, moved)


def test_a_resumed_run_has_them_too():
    m = normed()
    frozen = copy.deepcopy(m).eval()
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.1))
    run(opt, m, range(3))
    n = normed()
    other = EBUOptimizer(SGD(n.parameters(), lr=0.1))
    teacher = anchored(n, other)
    n.load_state_dict(m.state_dict())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    torch.testing.assert_close(teacher(X), frozen(X))


def test_they_follow_the_model_to_another_dtype():
    m = normed()
    frozen = copy.deepcopy(m).eval().double()
    opt = EBUOptimizer(
        SGD(m.parameters(), lr=0.1), fisher=None, anchor={p: p.detach() for p in m.parameters()}
    )
    teacher = anchored(m, opt)
    m.double()
    torch.testing.assert_close(teacher(X.double()), frozen(X.double()))


@pytest.mark.parametrize("make", [normed, net])
def test_a_teacher_made_too_late_says_so_where_there_are_statistics(make):
    m = make()
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anchored(m, opt)
    run(opt, m, range(1))
    if make is net:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            anchored(m, opt)
    else:
        with pytest.warns(
            UserWarning, match=r"BatchNorm statistics.*before the first phase"
        ) as seen:
            anchored(m, opt)
        assert seen[0].filename == __file__


# -- float32 masters --------------------------------------------------------------------------


def mastered(dtype=torch.bfloat16):
    """docs/loops.md's recipe after two steps: half weights, masters, their optimizer."""
    m = net(dtype)
    masters = [p.detach().float().requires_grad_() for p in m.parameters()]
    opt = EBUOptimizer(SGD(masters, lr=0.5))

    def steps():
        for _ in range(2):
            for phase, sign in ((opt.forget, -1), (opt.remember, 1)):
                with phase():
                    m(X.to(dtype)).float().add(sign).square().mean().backward()
                    for p, master in zip(m.parameters(), masters, strict=True):
                        master.grad, p.grad = p.grad.float(), None
            opt.step()
            with torch.no_grad():
                for p, master in zip(m.parameters(), masters, strict=True):
                    p.copy_(master)

    return m, masters, opt, steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_mapped(dtype):
    m, masters, opt, steps = mastered(dtype)
    teacher = anchored(m, opt, masters=dict(zip(m.parameters(), masters, strict=True)))
    steps()
    x = X.to(dtype)
    assert torch.equal(teacher(x), net(dtype)(x))
    assert not torch.equal(m(x), net(dtype)(x))


@pytest.mark.parametrize("given", ["none", "one"])
def test_a_model_that_the_optimizer_does_not_hold_is_refused(given):
    m, masters, opt, steps = mastered()
    one = {m[2].bias: masters[3]} if given == "one" else None
    teacher = anchored(m, opt, masters=one)
    steps()
    more = 3 if given == "none" else 2
    match = rf"does not hold 0\.weight and {more} more .*masters=dict\(zip.*requires_grad_\(False\)"
    with pytest.raises(RuntimeError, match=match):
        teacher(X.bfloat16())


def test_what_is_frozen_is_the_models_own():
    m = net()
    m[0].requires_grad_(False)
    opt = EBUOptimizer(SGD(m[2].parameters(), lr=0.5))
    teacher = anchored(m, opt)
    run(opt, m, range(2))
    assert torch.equal(teacher(X), net()(X))
    m[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"does not hold 0\.weight and 1 more"):
        teacher(X)


def test_what_is_trained_from_inside_a_phase_on_is_as_it_was():
    m = net()
    m[0].requires_grad_(False)
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.5))
    teacher = anchored(m, opt)
    for _ in range(2):
        m[0].requires_grad_(False)
        with opt.forget():
            m(X).square().sum().backward()
        with opt.remember():
            m[0].requires_grad_(True)
            assert torch.equal(teacher(X), net()(X))
            m(X).square().sum().backward()
        opt.step()
    assert not torch.equal(m[0].weight, net()[0].weight)


def test_masters_that_do_not_fit():
    m, masters, opt, _ = mastered()
    with pytest.raises(TypeError, match=r"masters must be a mapping.*list"):
        anchored(m, opt, masters=masters)
    turned = dict(zip(m.parameters(), reversed(masters), strict=True))
    with pytest.raises(ValueError, match=r"masters: 0\.weight has shape \(8, 4\).*\(2,\)"):
        anchored(m, opt, masters=turned)
