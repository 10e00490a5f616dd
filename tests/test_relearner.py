"""A relearner: against its formula, under every rule, and the weights that it puts back."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from ebu_optim.baselines import Joint, methods
from ebu_optim.diffusion import Adversary, Relearner

from .by_hand import gen
from .models import tiny_unet
from .steps import loss as loss_of
from .steps import net, params
from .test_adversary import attack_on
from .torchjd import runnable


def test_it_is_the_formula():
    draw = np.random.default_rng(0)
    w, x = draw.normal(size=(2, 3)), draw.normal(size=(5, 3))
    again, away = draw.normal(size=(5, 2)), draw.normal(size=(5, 2))
    at = w.copy()
    for _ in range(3):
        at -= 0.05 * np.sign((x @ at.T - again).T @ x)
    value = 0.5 * np.square(x @ at.T - away).sum()
    gradient = (x @ at.T - away).T @ x

    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w))
    told, back, far = map(torch.from_numpy, (x, again, away))
    relearner = Relearner(model.parameters(), steps=3, lr=0.05)
    moved = relearner.loss(
        lambda: 0.5 * (model(told) - far).square().sum(),
        lambda: 0.5 * (model(told) - back).square().sum(),
    )
    assert moved.item() == pytest.approx(value, rel=1e-12)
    (3 * moved).backward()
    torch.testing.assert_close(model.weight.grad, torch.from_numpy(3 * gradient))
    assert torch.equal(model.weight.detach(), torch.from_numpy(w))

    model.weight.grad = None
    with relearner.moved(lambda: 0.5 * (model(told) - back).square().sum()):
        torch.testing.assert_close(model.weight.detach(), torch.from_numpy(at))
        (0.5 * (model(told) - far).square().sum()).backward()
    torch.testing.assert_close(model.weight.grad, torch.from_numpy(gradient))
    assert torch.equal(model.weight.detach(), torch.from_numpy(w))


@pytest.mark.parametrize("where", ["relearn", "forget", "inside"])
def test_weights_are_put_back_when_a_loss_raises(where):
    model = tiny_unet()
    before, attack = params(model), attack_on(model)
    relearner, calls = Relearner(model.parameters(), steps=2, lr=1e-3), []

    def relearn():
        calls.append(any(not torch.equal(p, q) for p, q in zip(model.parameters(), before)))
        if where == "relearn" and len(calls) == 2:
            raise KeyboardInterrupt
        return attack(2, gen(4))

    def forget():
        raise KeyboardInterrupt

    def inside():
        with relearner.moved(relearn):
            forget()

    run = inside if where == "inside" else partial(relearner.loss, forget, relearn)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == [False, True]  # it had moved
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def build(name, m):
    given = {"fisher": "online"} if methods[name].fisher else {}
    opt = methods[name].build(SGD(m.parameters(), lr=0.05), **given)
    if methods[name].masked:
        opt.make_mask([lambda: loss_of(m, 50, True).backward()])
    return opt


FORGETTING = [n for n in methods if "forget" in methods[n].needs()]


@pytest.mark.parametrize("name", runnable(FORGETTING))
def test_a_step_of_every_rule_has_its_gradient(name):
    """Two steps, whose forget gradient is that at the weights plus that at moved ones."""
    m, other = net(), net()
    opt, by_hand = build(name, m), build(name, other)
    relearner = Relearner(m.parameters(), steps=2, lr=0.01)
    for i in range(2):
        with opt.forget():
            moved = relearner.loss(lambda i=i: loss_of(m, i, True), lambda i=i: loss_of(m, 9, True))
            (loss_of(m, i, True) + moved).backward()
        far = net()
        far.load_state_dict(other.state_dict())
        for _ in range(2):
            grads = torch.autograd.grad(loss_of(far, 9, True), list(far.parameters()))
            with torch.no_grad():
                for p, g in zip(far.parameters(), grads, strict=True):
                    p -= 0.01 * g.sign()
        with by_hand.forget():
            (loss_of(other, i, True)).backward()
            grads = torch.autograd.grad(loss_of(far, i, True), list(far.parameters()))
            for p, g in zip(other.parameters(), grads, strict=True):
                p.grad += g
        for o, net_of in ((opt, m), (by_hand, other)):
            if "remember" in o.needs:
                with o.remember():
                    loss_of(net_of, i, False).backward()
            o.step()
    for p, q in zip(params(m), params(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(p, q) for p, q in zip(params(m), params(net()), strict=True))


def test_with_an_adversary_each_attacks_the_model_as_it_is():
    model = tiny_unet()
    before, attack, seen = params(model), attack_on(model), []
    adversary = Adversary(model.class_embedding, [2], seed=1)
    relearner = Relearner(model.parameters(), steps=1, lr=1e-3)

    def attacked(label, generator):
        seen.append(all(torch.equal(p, q) for p, q in zip(model.parameters(), before)))
        return attack(label, generator)

    total = relearner.loss(lambda: attack(2, gen(1)), lambda: attack(2, gen(2)))
    adversary.step(attacked)
    with adversary.at():
        total = total + attack(2, gen(1))
    total.backward()
    assert seen == [True] * 3
    assert all(p.grad is not None for p in model.parameters())


def test_only_what_needs_a_gradient_moves():
    m = net()
    m[0].requires_grad_(False)
    before = params(m)
    with Relearner(m.parameters(), steps=1, lr=0.5).moved(lambda: loss_of(m, 0, True)):
        moved = [not torch.equal(p, q) for p, q in zip(m.parameters(), before, strict=True)]
    assert moved == [False, False, True, True]


def test_copies_that_autocast_keeps_are_of_the_weights_as_they_are():
    x = torch.randn(5, 4, generator=gen(1))
    found = []
    for kept in (True, False):
        m = net()
        relearner = Relearner(m.parameters(), steps=3, lr=0.3)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=kept):
            first = m(x).float().square().sum()
            far = relearner.loss(
                lambda m=m: (m(x).float() - 1).square().sum(),
                lambda m=m: (m(x).float() + 1).square().sum(),
            )
            after = m(x).float().square().sum()
        assert torch.equal(first, after)
        (far + after).backward()
        found.append([far.detach(), *(p.grad for p in m.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_scale_saves_what_16_bits_would_lose():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))

    def small():
        return (p.half().float() * torch.tensor([1e-8, -1e-8])).sum()

    relearner = Relearner([p], steps=1, lr=0.25)
    with relearner.moved(small):
        assert torch.equal(p, torch.tensor([1.0, -2.0]))
    with relearner.moved(small, scale=2.0**16):
        assert torch.equal(p, torch.tensor([0.75, -1.75]))
    relearner.loss(small, small, scale=2.0**16).backward()
    torch.testing.assert_close(p.grad, torch.tensor([1e-8, -1e-8]), rtol=1e-3, atol=0)


def test_an_overflow_at_the_moved_weights_skips_the_step_and_shrinks_the_scale():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt, scaler = Joint(SGD([p], lr=0.1)), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    relearner = Relearner([p], steps=1, lr=0.25)

    def large():
        return (p.half().float() * 100).sum()  # times the scale more than 65504

    with opt.forget():
        moved = relearner.loss(large, large, scale=scaler.get_scale())
        scaler.scale(p.sum() + moved).backward()
    with opt.remember():
        scaler.scale(p.sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.0]))
    assert scaler.get_scale() == 2.0**15


def test_a_scalar_without_a_sign_stays():
    p = nn.Parameter(torch.tensor([0.0, 1.0]))
    with Relearner([p], steps=1, lr=0.25).moved(lambda: p.sqrt().sum() * p.new_tensor(1.0)):
        assert p[1] == 0.75
    q = nn.Parameter(torch.tensor([-1.0, 1.0]))
    with Relearner([q], steps=1, lr=0.25).moved(lambda: q.sqrt().sum()):
        assert q.tolist() == [-1.0, 0.75]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"steps": 0}, "steps must be >= 1; got 0"),
        ({"lr": 0.0}, "lr must be > 0 and finite; got 0.0"),
        ({"lr": float("inf")}, "lr must be > 0 and finite; got inf"),
        ({"parameters": [torch.ones(2)]}, "has none that needs a gradient"),
    ],
)
def test_what_cannot_be_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        Relearner(**{"parameters": net().parameters(), **given})


def test_a_loss_that_misses_the_weights_is_refused():
    m, other = net(), net()
    relearner = Relearner(m.parameters())
    for loss in (torch.tensor(1.0), loss_of(other, 0, True)):
        with pytest.raises(ValueError, match="the relearn loss does not depend on the weights"):
            relearner.loss(lambda: loss_of(m, 0, True), lambda loss=loss: loss)
        with pytest.raises(ValueError, match="the forget loss does not depend on the weights"):
            relearner.loss(lambda loss=loss: loss, lambda: loss_of(m, 0, True))
