"""The rule where it is known without the oracle: special cases, freezing, statistics, a table."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from ebu_optim import EBUOptimizer

from .. import oracle
from ..inputs import numpy
from ..twin import Twin, assert_near, backward, drive, like, make

SHAPES = (5, 4), (7,), ()


def update(params, g_f, g_r, **options):
    """G of one step, flat; the weights are left as they were."""
    before = [p.detach().clone() for p in params]
    opt = EBUOptimizer(SGD(params, lr=1.0), **options)
    G = torch.cat([g.reshape(-1).clone() for g in drive(opt, params, g_f, g_r)])
    with torch.no_grad():
        for p, b in zip(params, before):
            torch.testing.assert_close(p, b - p.grad, rtol=0, atol=0)
            p.copy_(b)
            p.grad = None
    return G


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@pytest.fixture
def problem():
    params = make(*SHAPES)
    return params, like(params, 1), like(params, 2)


def penalised(params, **options):
    """Options with a fixed F and a distant theta0."""
    fisher = [t.abs() for t in like(params, 3)]
    anchor = like(params, 4)
    return options | {"fisher": dict(zip(params, fisher)), "anchor": dict(zip(params, anchor))}


# -- special cases ------------------------------------------------------------------------------


def test_full_penalty_without_modulation_is_the_summed_loss_with_ewc():
    """Selective Amnesia: L_f + L_r + (gamma / 2) sum F (theta - theta0)^2, by autograd."""
    params, gamma, x = make((4, 3), (4,), dtype=torch.float64), 0.7, torch.randn(9, 3).double()
    twin = [p.detach().clone().requires_grad_() for p in params]
    fisher, theta0 = [t.abs() for t in like(params, 3)], [p.detach().clone() for p in params]

    def losses(w, b):
        y = torch.tanh(x @ w.T + b)
        return (y[:4] - 1).square().sum(), y[4:].square().mean()

    opt = EBUOptimizer(
        SGD(params, lr=0.1, momentum=0.9),
        penalty="full",
        terms=("forget", "remember"),
        fisher=dict(zip(params, fisher)),
        fisher_scale="raw",
        gamma=gamma,
    )
    plain = SGD(twin, lr=0.1, momentum=0.9)
    for _ in range(6):
        opt.step(
            forget=lambda: losses(*params)[0].backward(),
            remember=lambda: losses(*params)[1].backward(),
        )
        plain.zero_grad()
        ewc = sum((F * (t - t0) ** 2).sum() for F, t, t0 in zip(fisher, twin, theta0))
        (sum(losses(*twin)) + gamma / 2 * ewc).backward()
        plain.step()
    torch.testing.assert_close([p.detach() for p in params], [t.detach() for t in twin])
    assert not torch.allclose(twin[0], theta0[0], atol=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.6, 1.0])
def test_everything_selected_is_a_weighted_sum(problem, alpha):
    params, g_f, g_r = problem
    g_f[0][0], g_r[1][0] = 0.0, 0.0
    f, r = flat(g_f), flat(g_r)
    G = update(params, g_f, g_r, alpha=alpha, gamma=0, delta=1.0)
    both = (f != 0) & (r != 0)
    expected = torch.where(both, (1 + alpha) * f + (2 - alpha) * r, 2 * f + r)
    torch.testing.assert_close(G, expected)
    routed = update(params, g_f, g_r, alpha=alpha, gamma=0, delta=1.0, update="routed")
    torch.testing.assert_close(routed, torch.where(both, alpha * f + (1 - alpha) * r, f + r))
    replaced = update(params, g_f, g_r, alpha=alpha, gamma=0, delta=1.0, update="replaced")
    blend = 2 * (alpha * f + (1 - alpha) * r) + r
    torch.testing.assert_close(replaced, torch.where(both, blend, 2 * f + r))


def test_a_larger_alpha_follows_the_forget_gradient(problem):
    params, g_f, g_r = problem
    only = {"update": "routed", "delta": 1.0, "gamma": 0}
    assert torch.equal(update(params, g_f, g_r, alpha=1.0, **only), flat(g_f))
    assert torch.equal(update(params, g_f, g_r, alpha=0.0, **only), flat(g_r))


def test_routing_treats_the_two_losses_alike_without_a_penalty(problem):
    params, g_f, g_r = problem
    one = update(params, g_f, g_r, alpha=0.3, delta=(0.3, 0.6), update="routed", gamma=0)
    two = update(params, g_r, g_f, alpha=0.7, delta=(0.6, 0.3), update="routed", gamma=0)
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["added", "replaced"])
def test_terms_add_up(problem, name):
    params, g_f, g_r = problem
    options = penalised(params, update=name, gamma=2.0)
    parts = [update(params, g_f, g_r, terms=(t,), **options) for t in oracle.TERMS]
    torch.testing.assert_close(sum(parts), update(params, g_f, g_r, **options))
    assert all(part.count_nonzero() for part in parts)


def test_routed_leaves_unrelated_scalars_without_an_update(problem):
    """method.md, step 5: 0 on unrelated, b on the overlap, g_f on forget-only."""
    params, g_f, g_r = problem
    options = penalised(params, update="routed", delta=0.4)
    _, (m_f, m_r), _ = oracle.step(*(numpy(t) for t in (params, g_f, g_r)), None, None, delta=0.4)
    m_f, m_r = (torch.tensor(np.concatenate([m.ravel() for m in ms])) for ms in (m_f, m_r))
    G = update(params, g_f, g_r, **options)
    assert (~m_f & ~m_r).sum() > 3
    assert torch.equal(G[m_f & ~m_r], flat(g_f)[m_f & ~m_r])
    assert G[~m_f & ~m_r].count_nonzero() == 0


def test_clipping_is_of_the_combined_gradient(problem):
    params, g_f, g_r = problem
    options = penalised(params, gamma=2.0)
    free = update(params, g_f, g_r, **options)
    clipped = update(params, g_f, g_r, max_grad_norm=0.5, **options)
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(clipped, free * (0.5 / free.norm()))
    loose = update(params, g_f, g_r, max_grad_norm=float(free.norm()) * 1.01, **options)
    assert torch.equal(loose, free)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_combination_beyond_the_range_of_float16_does_not_reach_the_weights(max_grad_norm):
    (p,) = params = make((2,), dtype=torch.float16)
    opt = EBUOptimizer(SGD(params, lr=1e-6), gamma=0, max_grad_norm=max_grad_norm)
    g = [torch.tensor([4e4, 1.0], dtype=torch.float16)]
    try:
        drive(opt, params, g, g)
    except RuntimeError as error:
        assert "non-finite" in str(error)  # noqa: PT017
    assert p.isfinite().all()


def test_a_fisher_beyond_float32_does_not_reach_the_weights():
    (p,) = params = make((2,))
    opt = EBUOptimizer(SGD(params, lr=1e-30), delta=(0.5, 1.0))
    g = [torch.tensor([1e25, 1.0])]  # finite, its square is not
    drive(opt, params, g, g)
    with pytest.raises(RuntimeError, match="non-finite combined gradient"):
        drive(opt, params, g, [torch.tensor([1.0, 1e25])])
    assert p.isfinite().all()


def test_a_warm_up_with_nan_is_refused():
    (p,) = params = make((2,))
    opt = EBUOptimizer(SGD(params, lr=1.0))
    with pytest.raises(RuntimeError, match=r"warmup_fisher.*NaN"):
        opt.warmup_fisher([lambda: backward(params, [torch.tensor([1.0, float("nan")])])])
    drive(opt, params, like(params, 1), like(params, 2))
    assert p.isfinite().all()


def test_alpha_delta_gamma_set_the_groups_and_take_effect(problem):
    params, g_f, g_r = problem
    groups = [{"params": params[:1]}, {"params": params[1:], "ebu_alpha": 0.1}]
    fixed = penalised(params)
    opt = EBUOptimizer(SGD(groups, lr=0.0), **fixed)
    assert opt.alpha == (0.6, 0.1)
    for alpha, delta, gamma in ((0.2, 0.9, 3.0), (0.9, (0.1, 0.7), 0.0), (1, 1, 50.0)):
        opt.alpha, opt.delta, opt.gamma = alpha, delta, gamma
        values = {"alpha": alpha, "delta": delta, "gamma": gamma}
        assert [getattr(opt, n) for n in values] == list(values.values())
        for group in opt.base.param_groups:
            assert {n: group[f"ebu_{n}"] for n in values} == values
        twin = Twin(params, numpy(fixed["fisher"].values()), fixed["anchor"].values(), **values)
        assert_near(drive(opt, params, g_f, g_r), twin.step(params, g_f, g_r)[0], scale=gamma + 5)
    with pytest.raises(ValueError, match="alpha must be in"):
        opt.alpha = 1.1
    assert opt.alpha == 1


# -- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        lambda p: Adam(p, lr=0.05),
        lambda p: AdamW(p, lr=0.05, weight_decay=0.3),
        lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    ],
    ids=["adam", "adamw", "sgd"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_scalars_stay_bit_identical_and_the_others_move_as_if_nothing_was(base, dtype):
    """After steps that select everything, so that momentum is there."""
    params = make(*SHAPES, dtype=dtype)
    opt = EBUOptimizer(base(params), unrelated="freeze", delta=1.0, max_grad_norm=1.0)
    for seed in (10, 20, 30):
        drive(opt, params, like(params, seed), like(params, seed + 1))
    opt.delta = 0.3
    free, twins = copy.deepcopy((opt, params))
    free.unrelated = "update"
    before, g_f, g_r = [p.detach().clone() for p in params], like(params, 1), like(params, 2)
    g_r[2] = None
    drive(opt, params, g_f, g_r)
    drive(free, twins, g_f, g_r)
    g_r[2] = torch.zeros((), dtype=dtype)
    _, (m_f, m_r), _ = oracle.step(*(numpy(t) for t in (params, g_f, g_r)), None, None, delta=0.3)
    unrelated = 0
    for p, b, t, f, r in zip(params, before, twins, m_f, m_r):
        related = torch.tensor(f | r)
        assert torch.equal(p, torch.where(related, t, b))
        unrelated += int((~related & (t != b)).sum())
    assert unrelated > 3  # the base alone would have moved them


# -- statistics ---------------------------------------------------------------------------------


def test_statistics_are_the_papers(problem):
    params, g_f, g_r = problem
    options = penalised(params, delta=(0.3, 0.6), gamma=2.0)
    opt = EBUOptimizer(SGD(params, lr=1.0), max_grad_norm=0.1, **options)
    assert opt.stats == {}
    anchor = [opt.anchor_of(p) for p in params]
    twin = Twin(params, numpy(options["fisher"].values()), anchor, delta=(0.3, 0.6), gamma=2.0)
    moved = np.concatenate([(t - t0).ravel() for t, t0 in zip(numpy(params), twin.anchor)])
    G, masks, (tau_f, tau_r) = twin.step(params, g_f, g_r)
    drive(opt, params, g_f, g_r)
    f, r = flat(g_f).double().numpy(), flat(g_r).double().numpy()
    m_f, m_r = (np.concatenate([m.ravel() for m in ms]) for ms in masks)
    both = m_f & m_r
    expected = {
        "total": 28,
        "forget_selected": 8,
        "remember_selected": 17,
        "overlap": both.sum(),
        "overlap_lift": both.sum() / (8 * 17 / 28),
        "overlap_opposed": (f * r < 0)[both].mean(),
        "cosine": f @ r / np.sqrt((f @ f) * (r @ r)),
        "forget_norm": np.sqrt(f @ f),
        "remember_norm": np.sqrt(r @ r),
        "update_norm": np.sqrt(sum((g**2).sum() for g in G)),
        "moved_overlap": np.linalg.norm(moved[both]),
        "moved_forget_only": np.linalg.norm(moved[m_f & ~m_r]),
        "moved_remember_only": np.linalg.norm(moved[m_r & ~m_f]),
        "moved_unrelated": np.linalg.norm(moved[~m_f & ~m_r]),
    }
    stats = opt.stats
    assert stats.pop("thresholds") == [*tau_f, *tau_r]
    assert stats == pytest.approx(expected, rel=1e-4)


def test_statistics_of_nothing_are_not_a_number():
    params = make((3,))
    opt = EBUOptimizer(SGD(params, lr=1.0))
    drive(opt, params, [torch.zeros(3)], [torch.ones(3)])
    stats = opt.stats
    assert stats["thresholds"] == [0.0, 1.0]
    assert (stats["forget_selected"], stats["remember_selected"]) == (0, 3)
    assert all(math.isnan(stats[n]) for n in ("overlap_lift", "overlap_opposed", "cosine"))


# -- theta0 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True])
def test_no_anchor_is_stored_where_it_is_zero(given):
    """LoRA: B starts at 0, so that A has no gradient at first."""
    a, b = params = make((3, 6), (6, 3), dtype=torch.float64)
    x = like([torch.empty(6, 8).double(), torch.empty(6, 8).double()], 7)
    with torch.no_grad():
        b.zero_()
    anchor = {p: p.detach().clone() for p in params} if given else None
    opt = EBUOptimizer(SGD(params, lr=1.0), gamma=3.0, anchor=anchor)
    twin = Twin(params, gamma=3.0)
    for n in range(4):
        g_f, g_r = (
            [g.clone() for g in torch.autograd.grad((b @ (a @ y)).sin().sum(), params)] for y in x
        )
        assert n or g_f[0].count_nonzero() == 0
        want, *_ = twin.step(params, g_f, g_r)
        assert_near(drive(opt, params, g_f, g_r), want, scale=10)
        assert opt.anchor_of(b).stride() == (0, 0)
        assert opt.anchor_of(b).shape == b.shape
        assert opt.anchor_of(b).count_nonzero() == 0
    assert opt.stats["moved_remember_only"] > 0


# -- a frozen table -----------------------------------------------------------------------------

TABLE = {
    ("added", "none"): [7, 2.2, 4, 7, 0.75, 7, 2, 7.2],
    ("added", "partial"): [7, 2.2, 4, 11, 0.75, 23, 2, 7.2],
    ("added", "full"): [8, 3.2, 6, 11, 9.75, 23, 27, 13.2],
    ("replaced", "none"): [7, 5.4, 4, 7, 0.75, 7, 2, 2.4],
    ("replaced", "partial"): [7, 5.4, 4, 11, 0.75, 23, 2, 2.4],
    ("replaced", "full"): [8, 6.4, 6, 11, 9.75, 23, 27, 8.4],
    ("routed", "none"): [4, 0.2, 2, 6, 0, 7, 0, 3.2],
    ("routed", "partial"): [4, 0.2, 2, 10, 0, 23, 0, 3.2],
}


@pytest.mark.parametrize(("name", "penalty"), TABLE)
def test_values(name, penalty):
    theta = torch.nn.Parameter(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1]))
    g_f = torch.tensor([4.0, -3, 2, 1, 0.5, 0, -1, 8])
    g_r = torch.tensor([-1.0, 5, 0, 6, 0.25, 7, 3, -4])
    fisher = torch.tensor([1.0, 1, 2, 4, 9, 16, 25, 6])  # mean 8
    options = {
        "fisher": {theta: fisher},
        "anchor": {theta: torch.zeros(8)},
        "gamma": math.sqrt(8),
        "update": name,
        "penalty": penalty,
    }
    G = update([theta], [g_f], [g_r], **options)
    torch.testing.assert_close(G, torch.tensor(TABLE[name, penalty], dtype=torch.float32))
