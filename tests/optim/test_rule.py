"""A rule of one's own, as a user writes it: the engine does all the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

from ebu_optim.optim import PhasedOptimizer, Rule

from ..steps import assert_same, loss, net, params, phases, run, snapshot


class Agreeing(Rule):
    """G = g_r + w g_f where the two gradients have the same sign, g_r elsewhere."""

    def update(self, slot, g_f, g_r, figures):
        return g_r + slot.group["ebu_w"] * g_f * (g_f * g_r > 0)


class Remembered(Agreeing):
    """The same with a state of its own: how often each scalar agreed."""

    def __init__(self, w: float) -> None:
        super().__init__(w=w)
        self.counts: dict = {}

    def begin(self, step):
        return {"cosine_sign": step.dot.sign()}

    def update(self, slot, g_f, g_r, figures):
        agrees = g_f * g_r > 0
        self.counts[slot.key] = self.counts.get(slot.key, torch.zeros_like(g_f)) + agrees
        return super().update(slot, g_f, g_r, figures)

    def state(self, slots):
        return {s.key: {"ebu_agreed": self.counts[s.key]} for s in slots if s.key in self.counts}

    def load(self, saved, slots):
        self.counts = {k: t["ebu_agreed"].clone() for k, t in saved.items() if "ebu_agreed" in t}


def gradients(m, i: int, forget: bool) -> list[Tensor]:
    twin = copy.deepcopy(m)
    return list(torch.autograd.grad(loss(twin, i, forget), list(twin.parameters())))


def test_the_update_is_the_rules():
    m = net()
    g_f, g_r = gradients(m, 0, True), gradients(m, 0, False)
    opt = PhasedOptimizer(SGD(m.parameters(), lr=1.0), Agreeing(w=0.5))
    before = params(m)
    run(opt, m, range(1))
    for p, b, f, r in zip(m.parameters(), before, g_f, g_r, strict=True):
        torch.testing.assert_close(b - p.detach(), r + 0.5 * f * (f * r > 0))
    assert opt.stats["cosine"] < 1
    assert opt.stats["update_norm"] > 0


def test_its_numbers_live_in_the_groups_and_are_saved():
    m = net()
    opt = PhasedOptimizer(SGD(m.parameters(), lr=0.1), Agreeing(w=0.5))
    opt.param_groups[0]["ebu_w"] = 0.25
    other = PhasedOptimizer(SGD(net().parameters(), lr=0.1), Agreeing(w=0.5))
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["ebu_w"] == 0.25
    assert "w=0.25" in repr(other)


def test_its_state_is_saved_and_a_resumed_run_is_the_same_run():
    m = net()
    opt = PhasedOptimizer(Adam(m.parameters(), lr=0.01), Remembered(0.5))
    run(opt, m, range(2))
    n = copy.deepcopy(m)
    other = PhasedOptimizer(Adam(n.parameters(), lr=0.01), Remembered(0.5))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, m, range(2, 4))
    run(other, n, range(2, 4))
    assert_same(snapshot(opt, m), snapshot(other, n))
    assert opt.stats["cosine_sign"] in (-1.0, 1.0)
    assert sum(float(c.sum()) for c in other.rule.counts.values()) > 0


def test_under_a_scaler_it_takes_the_same_steps_and_skips_an_overflow():
    plain, scaled = net(), net()
    one = PhasedOptimizer(SGD(plain.parameters(), lr=0.1), Agreeing(w=0.5), max_grad_norm=1.0)
    two = PhasedOptimizer(SGD(scaled.parameters(), lr=0.1), Agreeing(w=0.5), max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(3):
        phases(one, plain, i)
        one.step()
        for name in ("forget", "remember"):
            with getattr(two, name)():
                scaler.scale(loss(scaled, i, name == "forget")).backward()
        scaler.step(two)
        scaler.update()
    for a, b in zip(params(plain), params(scaled), strict=True):
        torch.testing.assert_close(a, b)
    before = params(scaled)
    with two.forget():
        scaler.scale(loss(scaled, 3, True) * float("inf")).backward()
    with two.remember():
        scaler.scale(loss(scaled, 3, False)).backward()
    scaler.step(two)
    scaler.update()
    assert two.last_step_skipped
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(before, params(scaled), strict=True))


@pytest.mark.parametrize("bad", ["forget", "remember"])
def test_nan_does_not_reach_the_weights(bad):
    m = net()
    opt = PhasedOptimizer(SGD(m.parameters(), lr=0.1), Agreeing(w=0.5))
    before = params(m)
    for name in ("forget", "remember"):
        with getattr(opt, name)():
            times = float("nan") if name == bad else 1.0
            (loss(m, 0, name == "forget") * times).backward()
    with pytest.raises(RuntimeError, match=f"58 (elements )?of the {bad} gradient"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params(m), strict=True))


def test_a_rule_with_a_penalty_finds_theta0_and_f():
    class Pulled(Rule):
        def begin(self, step):
            return {"_anchors": step.anchors}

        def update(self, slot, g_f, g_r, figures):
            return g_f + g_r + figures["_anchors"].pull(slot, g_r, 2.0)

    m = net()
    fisher = {p: torch.ones_like(p) for p in m.parameters()}
    anchor = {p: torch.zeros_like(p) for p in m.parameters()}
    g_f, g_r = gradients(m, 0, True), gradients(m, 0, False)
    before = params(m)
    opt = PhasedOptimizer(SGD(m.parameters(), lr=1.0), Pulled(), fisher=fisher, anchor=anchor)
    run(opt, m, range(1))
    for p, b, f, r in zip(m.parameters(), before, g_f, g_r, strict=True):
        torch.testing.assert_close(b - p.detach(), f + r + 2.0 * b)
    assert "moved" in opt.stats
