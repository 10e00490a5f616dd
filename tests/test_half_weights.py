"""Weights in bfloat16 and float16: with float32 masters, and what is right without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ebu_optim import EBUOptimizer

from .halves import BASES, HALF, PHASES, autocast, loss, scaler_of
from .steps import assert_same, net, params
from .twin import Twin


@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_bfloat16_weights_have_an_F_in_float32(update):
    m = net(torch.bfloat16)
    opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0, update=update)
    twin = Twin(list(m.parameters()), gamma=3.0, update=update)
    for i in range(3):
        theta, grads = params(m), {}
        for phase in PHASES:
            with getattr(opt, phase)():
                with autocast(torch.bfloat16):
                    loss(m, i, phase == "forget").backward()
                grads[phase] = [p.grad.clone() for p in m.parameters()]
        opt.step()
        G, _, _ = twin.step(theta, grads["forget"], grads["remember"])
        for p, g, F in zip(m.parameters(), G, twin.fisher):
            assert opt.anchor_of(p).dtype == p.dtype == torch.bfloat16
            # one rounding, the last: half a unit of bfloat16
            torch.testing.assert_close(p.grad.double(), torch.tensor(g), rtol=2.0**-8, atol=1e-7)
            torch.testing.assert_close(opt.fisher_of(p), torch.tensor(F).float(), rtol=1e-6, atol=0)


def masters_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().float().requires_grad_() for p in model.parameters()]


def hand_over(model: nn.Module, masters: list[Tensor]) -> None:
    for p, master in zip(model.parameters(), masters):
        grad = p.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        p.grad = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd_plain", "adamw_foreach", "adamw_fused"])
def test_float32_masters_of_half_weights(name, dtype):
    """docs/loops.md's recipe is the run of float32 weights that are cast in the forward pass."""
    m, twin = net(dtype), net(dtype).float()  # the twin starts from the rounded weights
    masters = masters_of(m)
    opt, other = (
        EBUOptimizer(BASES[name](p), gamma=3.0) for p in (masters, list(twin.parameters()))
    )
    scaler, theirs = (scaler_of(enabled=dtype == torch.float16) for _ in range(2))

    def cast(x):
        weights = {k: p.to(dtype) for k, p in twin.named_parameters()}
        return torch.func.functional_call(twin, weights, x.to(dtype))

    halves = slice(0, 3), slice(3, 6)
    for i, factor in enumerate((1, 1, 2.0**9, 1)):
        for rows in halves:
            for phase in PHASES:
                by = factor if phase == "remember" else 1
                with getattr(opt, phase)():
                    value = loss(lambda x: m(x.to(dtype)), i, phase == "forget", rows)
                    scaler.scale(value * by).backward()
                    hand_over(m, masters)
                with getattr(other, phase)():
                    theirs.scale(loss(cast, i, phase == "forget", rows) * by).backward()
        for s, o in ((scaler, opt), (theirs, other)):
            s.step(o)
            s.update()
            o.zero_grad()
        assert opt.last_step_skipped == (factor > 1 and dtype == torch.float16)
        with torch.no_grad():
            for p, master in zip(m.parameters(), masters):
                p.copy_(master)
        assert_same(masters, params(twin))
        assert_same(params(m), [p.to(dtype) for p in params(twin)])
    a, b = opt.state_dict(), other.state_dict()
    assert_same(a, b)
    assert all(s["ebu_fisher"].count_nonzero() for s in a["state"].values())


def test_small_updates_reach_masters_but_not_half_weights():
    """What the masters are for: a step below half a unit of the weight's format is rounded away."""
    m = net(torch.bfloat16)
    masters = masters_of(m)
    small = 1e-6
    for target in (list(m.parameters()), masters):
        opt = EBUOptimizer(SGD(target, lr=small), gamma=0.0)
        before = copy.deepcopy(target)
        for phase in PHASES:
            with getattr(opt, phase)():
                for p in target:
                    p.grad = torch.ones_like(p)
        opt.step()
        moved = sum(int((p != q).sum()) for p, q in zip(target, before))
        large = sum(int((p.abs() > 0.01).sum()) for p in target)
        assert moved < large if target[0].dtype == torch.bfloat16 else moved >= large


def test_masters_that_require_no_gradient_are_refused():
    """They would get no theta0 and no F: the penalty would be missing without a word."""
    opt = EBUOptimizer(SGD([torch.ones(3), torch.ones(2)], lr=0.1))
    with pytest.raises(RuntimeError, match="requires_grad_"), opt.forget():
        pass


def leaves_half_weights(name: str) -> bool:
    """True of torch 2.4's fused SGD on a CPU, which writes no full vector of half weights."""
    p = nn.Parameter(torch.ones(64, dtype=HALF))
    p.grad = torch.ones_like(p)
    BASES[name]([p]).step()
    return bool((p == 1).any())


@pytest.mark.parametrize("name", ["sgd_plain", "sgd_fused", "adamw_fused"])
def test_float16_weights_without_masters(name):
    """torch refuses to unscale their gradients; through the wrapper they are, so the docs warn."""
    if leaves_half_weights(name):
        pytest.skip("the base itself does not move half weights on a CPU in this torch")
    half = lambda m: lambda x: m(x.to(HALF))  # noqa: E731
    m, n = net(HALF), net(HALF)
    plain, opt = SGD(m.parameters(), lr=0.05), EBUOptimizer(BASES[name](n.parameters()), gamma=3.0)
    scaler = scaler_of(16.0)
    scaler.scale(loss(half(m), 0, False)).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        scaler.step(plain)
    scaler = scaler_of(16.0)
    for phase in PHASES:
        with getattr(opt, phase)():
            scaler.scale(loss(half(n), 0, phase == "forget")).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16"):
        scaler.unscale_(opt)
    scaler = scaler_of(16.0)
    scaler.scale(torch.ones(()))
    scaler.step(opt)
    scaler.update()
    other = net(HALF).float()
    reference = EBUOptimizer(BASES[name](other.parameters()), gamma=3.0)
    reference.step(*(lambda f=f: loss(other, 0, f).backward() for f in (True, False)))
    for p, q in zip(n.parameters(), other.parameters()):
        atol = 4 * torch.finfo(HALF).eps * q.grad.abs().max().item()
        torch.testing.assert_close(p.grad.float(), q.grad, rtol=0, atol=atol)
    assert not any(map(torch.equal, params(n), params(net(HALF))))


def test_float16_gradients_are_selected_and_squared_before_they_are_rounded_again():
    """Unscaled they are 1e-8, which float16 cannot hold: masks, thresholds and F do not care."""
    seen = []
    for by in (1.0, 2.0**-24):
        m = net(HALF)
        opt = EBUOptimizer(SGD(m.parameters(), lr=0.05), gamma=3.0)
        scaler = scaler_of(1 / by)
        for phase in PHASES:
            with getattr(opt, phase)():
                value = loss(lambda x, m=m: m(x.to(HALF)), 0, phase == "forget")
                scaler.scale(value * by).backward()
        scaler.step(opt)
        stats = opt.stats
        counts = [stats[key] for key in ("forget_selected", "remember_selected", "overlap")]
        sizes = [x / by for x in (stats["update_norm"], *stats["thresholds"])]
        seen.append((counts, sizes, [opt.fisher_of(p) / by**2 for p in m.parameters()]))
        lost = [p.grad[abs(p.grad) < 1e-7].numel() for p in m.parameters()]
    assert_same(*seen)
    assert sum(lost) > 0
