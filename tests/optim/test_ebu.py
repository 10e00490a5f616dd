"""The rule through EBUOptimizer: with SGD(lr=1) a step is -G, and G is the oracle's."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

from ebu_optim import EBUOptimizer

from .. import oracle
from ..inputs import DTYPES, SHAPES, lay_out, numpy
from ..steps import HAS_NAMES
from ..twin import Twin, assert_near, backward, drive, like, make

deltas = st.one_of(
    st.sampled_from((1e-9, 0.2, 0.5, 1.0)),
    st.tuples(st.sampled_from((0.1, 0.5, 1.0)), st.sampled_from((0.3, 0.5, 0.9))),
)
signature = st.fixed_dictionaries(
    {
        "penalty": st.sampled_from(("partial", "full", "none")),
        "update": st.sampled_from(("added", "replaced", "routed")),
        "terms": st.lists(st.sampled_from(oracle.TERMS), min_size=1, unique=True).map(tuple),
        "granularity": st.sampled_from(("model", "tensor")),
        "fisher_scale": st.sampled_from(("unit", "raw")),
        "max_grad_norm": st.sampled_from((None, None, 0.5, 1e4)),
    }
)
groups = st.fixed_dictionaries(
    {
        "ebu_alpha": st.sampled_from((0.0, 0.3, 0.6, 1.0)),
        "ebu_delta": deltas,
        "ebu_gamma": st.sampled_from((0.0, 0.5, 4.0)),
    }
)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), options=signature, seed=st.integers(0, 2**32))
def test_every_option_is_the_oracles_over_several_steps(data, options, seed):
    """Groups, dtypes, layouts, missing gradients, frozen parameters, theta0 and F of all kinds."""
    if options["update"] == "routed":
        options["terms"] = oracle.TERMS
    rng = np.random.default_rng(seed)
    pick = lambda values: values[rng.integers(len(values))]  # noqa: E731
    shapes = [(4,)] + [pick(SHAPES) for _ in range(rng.integers(6))]
    dtypes = data.draw(st.sampled_from([DTYPES, *[(d,) for d in DTYPES]]), "dtypes")
    unfolded = ("contiguous", "transposed", "channels_last")
    weight = lambda s, d: lay_out(torch.tensor(rng.standard_normal(s)).to(d), pick(unfolded))  # noqa: E731
    params = [torch.nn.Parameter(weight(s, pick(dtypes))) for s in shapes]
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    named = [(f"w{i}", p) for i, p in enumerate(params)]

    values = data.draw(st.lists(groups, min_size=1, max_size=3), "groups")
    where = [rng.integers(len(values)) if i else 0 for i in range(len(params))]
    of = [[named[i] for i in range(len(params)) if where[i] == g] for g in range(len(values))]
    of[0].append(("frozen", frozen))
    if not HAS_NAMES:
        of = [[p for _, p in group] for group in of]
    base = SGD([{"params": of[g], **v} for g, v in enumerate(values) if of[g]], lr=1.0)
    per = {n: [values[g][f"ebu_{n}"] for g in where] for n in ("alpha", "delta", "gamma")}

    by_name = HAS_NAMES and data.draw(st.booleans(), "by name")
    mapping = lambda tensors: {n if by_name else p: t for (n, p), t in zip(named, tensors)}  # noqa: E731
    kind = data.draw(st.sampled_from(("online", "fixed", None)), "fisher")
    fixed = [torch.tensor(rng.random(p.shape)).to(pick(DTYPES)) for p in params]
    anchor = like(params, 3) if data.draw(st.booleans(), "anchor") else None
    freeze = data.draw(st.booleans(), "freeze")
    opt = EBUOptimizer(
        base,
        fisher=mapping(fixed) if kind == "fixed" else kind,
        anchor=None if anchor is None else mapping(anchor),
        unrelated="freeze" if freeze else "update",
        **options,
    )
    fisher = {"online": "online", None: None, "fixed": numpy(fixed)}[kind]
    twin = Twin(params, fisher, anchor, **options, **per)

    missing = data.draw(
        st.sets(st.sampled_from([(i, s) for i in range(1, 7) for s in "fr"])), "none"
    )
    missing -= {(i, "r") for i, s in missing if s == "f"}  # in both: another test
    for n in range(3):
        g_f, g_r = (
            [
                None
                if (i, s) in missing
                else torch.tensor(rng.standard_normal(p.shape)).to(p.dtype).mul(4).round().div(4)
                for i, p in enumerate(params)
            ]
            for s in "fr"
        )
        before = [p.detach().clone() for p in params]
        G, (m_f, m_r), taus = twin.step(params, g_f, g_r)
        got = drive(opt, params, g_f, g_r)
        assert_near(got, G, scale=10.0)
        for p, b, g, f, r in zip(params, before, got, m_f, m_r):
            moved = b - g
            kept = torch.where(torch.tensor(f | r), moved, b) if freeze else moved
            assert torch.equal(p, kept)
        if all(p.numel() for p in params):  # the others have a test of their own
            assert sorted(opt.stats["thresholds"]) == sorted(t for side in taus for t in side)
        assert opt.stats["total"] == sum(p.numel() for p in params)
        assert torch.equal(frozen, torch.ones(3))
        assert frozen.grad is None, n


def step_with(opt, params, seed):
    return drive(opt, params, like(params, seed), like(params, seed + 1))


# -- who takes part -----------------------------------------------------------------------------


def test_groups_with_one_delta_are_ranked_together_and_another_by_itself():
    a, b, c = params = make((6,), (4,), (8,))
    groups = [{"params": [a], "ebu_delta": 0.5}, {"params": [b]}, {"params": [c]}]
    opt = EBUOptimizer(SGD(groups, lr=1.0), delta=0.5, gamma=0)
    opt.param_groups[2]["ebu_delta"] = (0.5, 0.25)  # together with the others for g_f alone
    g = [torch.arange(1.0, 7), torch.arange(7.0, 11), torch.arange(11.0, 19)]
    drive(opt, params, g, [-t for t in g])
    assert opt.stats["thresholds"] == [10.0, 6.0, 17.0]
    assert opt.stats["forget_selected"] == 9
    assert opt.stats["remember_selected"] == 5 + 2


def test_parameters_without_a_gradient_in_both_phases_count_for_nothing():
    params = make((4,), (100,))
    b = params[1]
    before = b.detach().clone()
    opt = EBUOptimizer(SGD(params, lr=1.0, weight_decay=0.1), penalty="full", unrelated="freeze")
    g = torch.tensor([1.0, 2, 3, 4])
    drive(opt, params, [g, None], [-g, None])
    assert opt.stats["total"] == 4
    assert opt.stats["thresholds"] == [3.0, 3.0]
    assert b.grad is None
    assert torch.equal(b, before)


def test_a_gradient_missing_in_one_phase_is_zero_there():
    params = make((4,), (4,))
    opt = EBUOptimizer(SGD(params, lr=1.0), gamma=0, delta=1.0, alpha=0.6)
    f, r = torch.arange(1.0, 5), -torch.arange(2.0, 6)
    first, second = drive(opt, params, [f, None], [None, r])
    assert torch.equal(first, 2 * f)  # g_f + m
    assert torch.equal(second, r)
    assert opt.stats["overlap"] == 0


def test_a_tied_parameter_counts_once():
    one, two = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
    two.weight = one.weight
    model = torch.nn.Sequential(one, two)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the second entry
        bases = [SGD(model.parameters(), lr=1.0), SGD([one.weight, two.weight], lr=1.0)]
    x = torch.eye(3)
    for base in bases:
        base.zero_grad()
        opt = EBUOptimizer(base, gamma=0, delta=1.0)
        opt.step(
            forget=lambda: model(x).sum().backward(), remember=lambda: model(x * 2).sum().backward()
        )
        assert opt.stats["total"] == 9
        assert opt.stats["forget_selected"] == 9


def test_thresholds_of_the_statistics_leave_empty_parameters_out():
    for granularity in ("model", "tensor"):
        params = make((0,), (4,), (2, 0))
        opt = EBUOptimizer(SGD(params, lr=1.0), granularity=granularity)
        g = [torch.zeros(0), torch.tensor([1.0, 2, 3, 4]), torch.zeros(2, 0)]
        drive(opt, params, g, g)
        assert opt.stats["thresholds"] == [3.0, 3.0], granularity


def test_a_parameter_frozen_when_built_takes_part_once_it_is_unfrozen():
    params = make((5,), (5,))
    b = params[1]
    b.requires_grad_(False)
    fisher, anchor = [torch.ones(5), torch.full((5,), 4.0)], [torch.zeros(5)] * 2
    mapping = {"fisher": dict(zip(params, fisher)), "anchor": dict(zip(params, anchor))}
    opt = EBUOptimizer(SGD(params, lr=1.0), **mapping, fisher_scale="raw")
    drive(opt, params, [torch.ones(5), None], [torch.ones(5), None])
    b.requires_grad_(True)
    twin = Twin(params, numpy(fisher), anchor, fisher_scale="raw")
    g_f, g_r = like(params, 1), like(params, 2)
    want, *_ = twin.step(params, g_f, g_r)
    assert_near(drive(opt, params, g_f, g_r), want)


def test_order_of_the_parameters_is_of_no_consequence():
    shapes = [(3, 4), (7,), (2, 2, 2), (1,)]
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        params = make(*shapes)
        opt = EBUOptimizer(SGD([params[i] for i in order], lr=1.0), gamma=2.0)
        for seed in (1, 3):
            step_with(opt, params, seed)
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**30])
def test_scaling_both_losses_scales_the_update_with_the_unit_fisher(factor):
    """The penalty included, so that gamma means the same for a sum and for a mean."""
    updates = {}
    for c in (1.0, factor):
        params = make((5, 5))
        opt = EBUOptimizer(SGD(params, lr=0.1 / c), gamma=3.0)
        for seed in (1, 3, 5):
            g_f, g_r = ([c * g for g in like(params, s)] for s in (seed, seed + 1))
            updates[c] = drive(opt, params, g_f, g_r)[0] / c
    torch.testing.assert_close(updates[1.0], updates[factor])


# -- online Fisher ------------------------------------------------------------------------------


def test_online_fisher_is_the_mean_over_the_accepted_steps_unclipped():
    (p,) = params = make((6,))
    opt = EBUOptimizer(SGD(params, lr=1.0), nonfinite="skip", max_grad_norm=0.01)
    squares = []
    for seed in range(5):
        g_f, g_r = like(params, seed), like(params, seed + 50)
        if seed == 2:
            g_f[0][1] = math.nan
        else:
            squares.append(g_r[0] ** 2)
        drive(opt, params, g_f, g_r)
        torch.testing.assert_close(opt.fisher_of(p), torch.stack(squares).mean(0))
    assert opt.skipped_steps == 1


def test_online_fisher_of_a_parameter_that_sits_out_a_step_is_a_mean():
    """Of its squares over all steps, or over those where it had a gradient; of nothing between."""
    a, b = params = make((4,), (4,))
    opt = EBUOptimizer(SGD(params, lr=1.0))
    first, second, third = like(params, 1), like(params, 2), like(params, 3)
    drive(opt, params, first, first)
    drive(opt, params, [second[0], None], [second[0], None])
    drive(opt, params, third, third)
    squares = [f**2 + t**2 for f, t in zip(first, third)]
    torch.testing.assert_close(opt.fisher_of(a), (squares[0] + second[0] ** 2) / 3)
    assert any(torch.allclose(opt.fisher_of(b), squares[1] / n) for n in (2, 3))


def test_unit_scale_is_the_mean_of_all_of_fisher_after_a_step_without_some():
    params = make((4,), (4,))
    opt = EBUOptimizer(SGD(params, lr=1.0), penalty="full")
    first, second = like(params, 1), like(params, 2)
    first[1] *= 10
    drive(opt, params, first, first)
    drive(opt, params, [second[0], None], [second[0], None])
    fisher = numpy(opt.fisher_of(p) for p in params)
    twin = Twin(params, fisher, [opt.anchor_of(p) for p in params], penalty="full")
    want, *_ = twin.step(params, second, first)
    assert_near(drive(opt, params, second, first), want)


@pytest.mark.parametrize("freeze", [True, False])
def test_warmup_takes_the_mean_over_its_batches_at_theta0(freeze):
    params = make((6,), (3,))
    before = [p.detach().clone() for p in params]
    opt = EBUOptimizer(SGD(params, lr=1.0), gamma=2.0)
    batches = [like(params, s) for s in (10, 11, 12)]
    opt.warmup_fisher([lambda g=g: backward(params, g) for g in batches], freeze=freeze)
    mean = [sum(g[i] ** 2 for g in batches) / 3 for i in range(2)]
    torch.testing.assert_close([opt.fisher_of(p) for p in params], mean)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    assert all(p.grad is None for p in params)
    twin = Twin(params, numpy(mean), gamma=2.0)
    twin.online, twin.count = not freeze, 3
    for seed in (1, 3, 5):
        want, *_ = twin.step(params, like(params, seed), like(params, seed + 1))
        assert_near(step_with(opt, params, seed), want)
    for p, want in zip(params, twin.fisher):
        np.testing.assert_allclose(opt.fisher_of(p), want, rtol=1e-5)


def test_a_loaded_run_is_the_same_run_bit_for_bit():
    runs = []
    for load in (False, True):
        params = make((40, 30), (7,))
        opt = EBUOptimizer(SGD(params, lr=0.1), gamma=5.0)
        for seed in range(8):
            if seed == 4 and load:
                saved, opt = opt.state_dict(), EBUOptimizer(SGD(params, lr=0.1), gamma=5.0)
                opt.load_state_dict(saved)
                opt.zero_grad()
            step_with(opt, params, 2 * seed)
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(*runs, rtol=0, atol=0)
