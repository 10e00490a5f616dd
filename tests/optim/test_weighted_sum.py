"""G = w_f g_f + w_r g_r + c F (theta - theta0) on the kernels, against the formula written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from ebu_optim.baselines import Joint, SelectiveAmnesia
from ebu_optim.kernels import chunked, cpu
from ebu_optim.optim import PhasedOptimizer, Rule, WeightedSum

SHAPES = ((40, 30), (7,), (), (3, 5, 2), (1000,))
EVERY = pytest.mark.parametrize("fused", [None, False])


class Plain(Rule):
    """The same in plain torch, one tensor at a time."""

    def begin(self, step):
        return {"_anchors": step.anchors, "_scale": step.anchors.scale(step.shards)}

    def update(self, slot, g_f, g_r, figures):
        group = slot.group
        G = g_f.mul_(group["ebu_forget_weight"]).add_(g_r, alpha=group["ebu_remember_weight"])
        pull = figures["_anchors"].pull(slot, G, figures["_scale"])
        return G.add_(pull, alpha=2 * group["ebu_lam"])


class Pulled(WeightedSum):
    """Selective Amnesia's sum, as a user would write it."""

    def weigh(self, group, figures):
        return group["ebu_forget_weight"], group["ebu_remember_weight"], 2 * group["ebu_lam"]


def tensors(seed, dtype=torch.float32, positive=False):
    rng = np.random.default_rng(seed)
    made = (rng.standard_normal(s) * 10.0 ** rng.integers(-3, 2, s) for s in SHAPES)
    return [torch.tensor(abs(x) if positive else x, dtype=dtype) for x in made]


def problem(rule, dtype=torch.float32, **options):
    params = [nn.Parameter(t) for t in tensors(0, dtype)]
    base = SGD(
        [
            {"params": params[:2], "ebu_forget_weight": 2.5},
            {"params": params[2:], "ebu_lam": 0.125},
        ],
        lr=0.0,
    )
    if isinstance(rule, type):
        rule = rule(forget_weight=0.75, remember_weight=1.5, lam=3.0)
    fisher = dict(zip(params, tensors(1, positive=True), strict=True))
    anchor = dict(zip(params, tensors(2, dtype), strict=True))
    return PhasedOptimizer(base, rule, fisher=fisher, anchor=anchor, **options), params


def updates(opt, params, dtype=torch.float32, missing=()):
    """G, which the step leaves on the parameters; what `missing` names made no gradient."""
    for seed, phase in ((3, "forget"), (4, "remember")):
        with getattr(opt, phase)():
            for i, (p, g) in enumerate(zip(params, tensors(seed, dtype), strict=True)):
                p.grad = None if (i, phase) in missing else g.to(p.device)
    opt.step()
    return [p.grad.double().cpu().numpy() for p in params]


def formula(dtype, scale, missing=()):
    """In float64; and the sum of the magnitudes, which rounding is relative to."""
    theta, f, r, theta0 = ([t.double().numpy() for t in tensors(s, dtype)] for s in (0, 3, 4, 2))
    F = [t.double().numpy() for t in tensors(1, positive=True)]
    out, size = [], []
    for i in range(len(SHAPES)):
        w_f, c = (2.5, 6.0) if i < 2 else (0.75, 0.25)
        a, b = (
            0.0 if (i, phase) in missing else w * g[i]
            for phase, w, g in (("forget", w_f, f), ("remember", 1.5, r))
        )
        p = c * scale * F[i] * (theta[i] - theta0[i])
        out.append(a + b + p)
        size.append(abs(a) + abs(b) + c * scale * F[i] * (abs(theta[i]) + abs(theta0[i])))
    return out, size


def unit():
    F = np.concatenate([t.double().numpy().ravel() for t in tensors(1, positive=True)])
    return 1 / np.sqrt(F.mean())


def worst(got, want, size, dtype):
    """The largest error, in units of half a last place of the terms and of the result."""
    eps = torch.finfo(dtype).eps
    return max(
        (abs(g - w) / (2.0**-24 * s + eps / 2 * abs(w))).max()
        for g, w, s in zip(got, want, size, strict=True)
    )


@EVERY
@pytest.mark.parametrize("fisher_scale", ["raw", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sum_is_the_formula_to_rounding(fused, fisher_scale, dtype):
    missing = {(1, "forget"), (4, "remember")}
    opt, params = problem(Pulled, dtype, fisher_scale=fisher_scale)
    opt.rule.fused = fused
    scale = unit() if fisher_scale == "unit" else 1.0
    got = updates(opt, params, dtype, missing)
    assert worst(got, *formula(dtype, scale, missing), dtype) <= 2


@EVERY
def test_one_tensor_at_a_time_makes_the_same_of_it_and_the_same_figures(fused):
    missing = {(0, "remember")}
    made = [problem(rule) for rule in (Pulled, Plain)]
    made[0][0].rule.fused = fused
    got, want = ([g.astype(np.float32) for g in updates(*m, missing=missing)] for m in made)
    _, size = formula(torch.float32, 1.0, missing)
    for a, b, s in zip(got, want, size, strict=True):
        assert (abs(a - b) <= 2 * np.spacing(s.astype(np.float32))).all()
    first, second = (opt.stats for opt, _ in made)
    assert list(first) == list(second)
    for name, value in second.items():
        assert first[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


@EVERY
@pytest.mark.parametrize("needs", [("forget",), ("remember",)])
def test_one_gradient_alone_is_the_update(fused, needs):
    params = [nn.Parameter(t) for t in tensors(0)]
    opt = PhasedOptimizer(SGD(params, lr=0.0), WeightedSum(needs))
    opt.rule.fused = fused
    got = updates(opt, params)
    for g, want in zip(got, tensors(3 if needs == ("forget",) else 4), strict=True):
        np.testing.assert_array_equal(g, want.double().numpy())
    assert {"cosine", f"{needs[0]}_norm"} & opt.stats.keys() == {f"{needs[0]}_norm"}


def test_numbers_follow_a_schedule_and_the_groups():
    opt, params = problem(Pulled)
    updates(opt, params)
    for group in opt.param_groups:
        group["ebu_forget_weight"], group["ebu_lam"] = 0.0, 0.0
    got = updates(opt, params)
    for g, r in zip(got, tensors(4), strict=True):
        np.testing.assert_array_equal(g, (1.5 * r).double().numpy())


@EVERY
@pytest.mark.parametrize("build", [Joint, lambda b: SelectiveAmnesia(b, fisher="online")])
def test_no_selection_is_made(fused, build, monkeypatch):
    def select(*_):
        raise AssertionError("a selection was made")

    for module in (cpu, chunked):
        monkeypatch.setattr(module, "select", select)
    params = [nn.Parameter(t) for t in tensors(0)]
    opt = build(SGD(params, lr=0.0))
    opt.rule.fused = fused
    updates(opt, params)
    assert opt.stats["total"] == sum(p.numel() for p in params)


@EVERY
def test_online_fisher_is_the_mean_of_the_squares_of_accepted_steps(fused):
    params = [nn.Parameter(t) for t in tensors(0)]
    opt = SelectiveAmnesia(SGD(params, lr=0.0), fisher="online", nonfinite="skip")
    opt.rule.fused = fused
    for _ in range(2):
        updates(opt, params, missing={(0, "remember"), (1, "forget")})
    opt.param_groups[0]["ebu_forget_weight"] = float(np.finfo(np.float32).max)
    updates(opt, params)  # G overflows where |g_f| > 1
    assert opt.last_step_skipped
    for i, (p, r) in enumerate(zip(params, tensors(4), strict=True)):
        expected = torch.zeros_like(r) if i == 0 else r.square()
        torch.testing.assert_close(opt.fisher_of(p), expected, rtol=2**-23, atol=0)


def test_kernels_that_are_not_there_are_refused_when_it_is_built():
    rule = WeightedSum()
    rule.fused = True
    with pytest.raises(RuntimeError, match=r"fused=True, but .* float64"):
        PhasedOptimizer(SGD([nn.Parameter(torch.zeros(3).double())], lr=0.0), rule)
