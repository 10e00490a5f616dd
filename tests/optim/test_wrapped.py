"""Whatever the base, the wrapper is a torch optimizer: groups, schedulers, hooks, copies."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as S

from ebu_optim import EBUOptimizer

from ..steps import BASES, assert_same, bare, build, loss, net, params, phases, run, snapshot

SCHEDULERS = {
    "step": lambda o: S.StepLR(o, 1, 0.5),
    "cosine": lambda o: S.CosineAnnealingLR(o, 4),
    "onecycle": lambda o: S.OneCycleLR(
        o, 0.1, total_steps=6, cycle_momentum=bool({"momentum", "betas"} & o.defaults.keys())
    ),
    "lambda": lambda o: S.LambdaLR(o, lambda i: 1 / (1 + i)),
    "plateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0),
}
BASE = pytest.mark.parametrize("name", BASES)


def hand_over_G(opt: EBUOptimizer, m: nn.Module, twin: nn.Module) -> None:
    """Give the twin's parameters the gradients that the base is about to see."""

    def copy_grads(*_) -> None:
        for p, q in zip(m.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()

    opt.base.register_step_pre_hook(copy_grads)  # schedule-free spoils them in place


@BASE
def test_it_is_an_optimizer_and_shares_everything_with_its_base(name):
    m, opt = build(name)
    run(opt, m, range(2))
    for _ in range(2):
        assert isinstance(opt, Optimizer)
        for attribute in ("param_groups", "state", "defaults"):
            assert getattr(opt, attribute) is getattr(opt.base, attribute)
        opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = 0.25
    assert opt.base.param_groups[0]["lr"] == 0.25
    assert hasattr(opt, "train") == hasattr(opt, "eval") == (name == "schedulefree")


@BASE
def test_weights_are_those_of_the_base_stepped_by_hand_on_G(name):
    m, opt = build(name)
    twin = net()
    base = bare(name, twin)
    hand_over_G(opt, m, twin)
    for i in range(4):
        run(opt, m, range(i, i + 1))
        base.step()
        assert_same(params(m), params(twin))
    assert_same(opt.base.state_dict()["state"], base.state_dict()["state"])
    assert not any(map(torch.equal, params(m), params(net())))


def test_G_is_its_formula_where_everything_is_selected_with_the_alpha_of_each_group():
    m = net()
    groups = [{"params": m[0].parameters()}, {"params": m[2].parameters(), "ebu_alpha": 0.9}]
    opt = EBUOptimizer(SGD(groups, lr=0.05), alpha=0.3, delta=1.0, gamma=0.0)
    g_f, g_r = (torch.autograd.grad(loss(m, 0, f), list(m.parameters())) for f in (True, False))
    run(opt, m, range(1))
    for p, f, r, a in zip(m.parameters(), g_f, g_r, (0.3, 0.3, 0.9, 0.9), strict=True):
        torch.testing.assert_close(p.grad, (1 + a) * f + (2 - a) * r)


def test_train_and_eval_of_a_schedule_free_base():
    m, opt = build("schedulefree")
    run(opt, m, range(3))
    trained = params(m)
    opt.eval()
    assert not any(map(torch.equal, params(m), trained))
    opt.train()
    torch.testing.assert_close(params(m), trained)


@BASE
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_attach_without_a_warning_and_take_effect(name, schedule):
    m, opt = build(name)
    twin = net()
    base = bare(name, twin)
    hand_over_G(opt, m, twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = SCHEDULERS[schedule](opt), SCHEDULERS[schedule](base)
        before = float(opt.param_groups[0]["lr"])
        for i in range(4):
            run(opt, m, range(i, i + 1))
            base.step()
            for scheduler in (ours, theirs):
                scheduler.step(*([1.0] if schedule == "plateau" else []))
            assert_same(params(m), params(twin))
            assert float(opt.param_groups[0]["lr"]) == float(base.param_groups[0]["lr"])
    assert float(opt.param_groups[0]["lr"]) != before


@BASE
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy with a scheduler"])
def test_copies_go_on_alike(name, how):
    m, opt = build(name)
    if "scheduler" in how:
        S.StepLR(opt, 1)
    run(opt, m, range(3))
    n, other = (
        pickle.loads(pickle.dumps((m, opt)))  # noqa: S301
        if how == "pickle"
        else copy.deepcopy((m, opt))
    )
    assert {id(p) for g in other.param_groups for p in g["params"]} == {*map(id, n.parameters())}
    run(other, n, range(3, 6))
    assert not torch.equal(m[0].weight, n[0].weight)
    run(opt, m, range(3, 6))
    assert_same(snapshot(opt, m), snapshot(other, n))


def refuses_added_groups(make) -> bool:
    """True of Adagrad in torch 2.4, which makes no state for a group added later."""
    p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    base = make([p])
    base.add_param_group({"params": [q]})
    q.grad = torch.ones(1)
    try:
        base.step()
    except KeyError:
        return True
    return False


@BASE
def test_add_param_group_in_the_middle(name):
    if name == "adagrad" and refuses_added_groups(BASES[name]):
        pytest.skip("the base itself cannot step a group that was added later")
    m, twin = net(), net()
    opt = EBUOptimizer(BASES[name](m[0].parameters()), gamma=3.0)
    base = BASES[name](twin[0].parameters())
    hand_over_G(opt, m, twin)
    for o in (opt, base) if name == "schedulefree" else ():
        o.train()
    for i in range(4):
        if i == 2:
            assert torch.equal(m[2].weight, net()[2].weight)
            opt.add_param_group({"params": list(m[2].parameters()), "lr": 0.02, "ebu_alpha": 0.9})
            base.add_param_group({"params": list(twin[2].parameters()), "lr": 0.02})
        m[2].requires_grad_(i >= 2)
        run(opt, m, range(i, i + 1))
        base.step()
        assert_same(params(m), params(twin))
    assert opt.param_groups is opt.base.param_groups
    assert (opt.alpha, opt.delta, opt.gamma) == ((0.6, 0.9), 0.5, 3.0)
    assert torch.equal(opt.anchor_of(m[2].weight), net()[2].weight)
    assert opt.fisher_of(m[2].weight).count_nonzero()


def test_tensors_replaced_in_the_groups_keep_their_anchor_and_fisher():
    m, opt = build("sgd")
    n, other = build("sgd")
    run(opt, m, range(4))
    run(other, n, range(2))
    for layer in (n[0], n[2]):
        for key, p in list(layer.named_parameters()):
            setattr(layer, key, nn.Parameter(p.detach().clone()))
    other.param_groups[0]["params"] = list(n.parameters())
    run(other, n, range(2, 4))
    assert_same(snapshot(opt, m), snapshot(other, n))


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_the_phase_it_is_in_and_outside_both(to_none):
    m, opt = build()
    n, other = build()
    for i in range(2):
        with other.forget():
            loss(n, 7, True).backward()
            other.zero_grad(set_to_none=to_none)
            loss(n, i, True).backward()
        with other.remember():
            loss(n, 8, False).backward()
            other.zero_grad(set_to_none=to_none)
            loss(n, i, False).backward()
        with other.forget():
            other.zero_grad(set_to_none=to_none)
            loss(n, i, True).backward()
        other.step()
        other.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in n.parameters())

        phases(other, n, 9)
        other.zero_grad(set_to_none=to_none)
        with pytest.raises(RuntimeError, match="phase"):
            other.step()
    run(opt, m, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))


def test_hooks():
    m, opt = build()
    seen = []
    handles = [
        opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", o))),
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", o))),
        opt.register_state_dict_pre_hook(lambda o: seen.append(("save", o))),
        opt.register_state_dict_post_hook(lambda o, s: {**s, "note": 1}),
        opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(("load", s.pop("note")))),
        opt.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o))),
    ]
    run(opt, m, range(1))
    opt.step(lambda: loss(m, 1, True).backward(), lambda: loss(m, 1, False).backward())
    state = opt.state_dict()
    assert state["note"] == 1
    opt.load_state_dict(state)
    assert state["note"] == 1  # a hook works on a copy
    steps = [("pre", opt), ("post", opt)]
    assert seen == [*steps, *steps, ("save", opt), ("load", 1), ("loaded", opt)]
    for handle in handles:
        handle.remove()
    run(opt, m, range(2, 3))
    assert len(seen) == 7


def test_repr_names_every_option_and_the_base():
    m = net()
    groups = [{"params": m[0].parameters()}, {"params": m[2].parameters(), "ebu_alpha": 0.25}]
    opt = EBUOptimizer(Adam(groups, lr=1e-3), delta=(0.5, 0.25), gamma=2.0)
    text = repr(opt)
    assert text.startswith("EBUOptimizer(alpha=(0.6, 0.25), delta=(0.5, 0.25), gamma=2.0, ")
    for option in ("fisher='online'", "update='added'", "nonfinite='raise'", "max_grad_norm=None"):
        assert option in text
    assert repr(opt.base) in text


def test_a_compiled_model():
    m, opt = build()
    n, other = build()
    run(opt, m, range(2))
    run(other, torch.compile(n, backend="aot_eager"), range(2))
    torch.testing.assert_close(params(n), params(m))
    assert other.stats["overlap"] == opt.stats["overlap"]


def test_the_users_random_streams_are_untouched():
    m, opt = build(unrelated="freeze", max_grad_norm=1.0)

    def streams():
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = streams()
    run(opt, m, range(2))
    opt.load_state_dict(opt.state_dict())
    assert_same(before, streams())


@pytest.mark.parametrize("what", ["step", "loop"])
def test_inside_compiled_code_a_step_is_the_same(what):
    """A graph break, as any torch.optim step is one; what is round it may be compiled."""
    torch._dynamo.reset()
    made = [build() for _ in range(2)]

    def loop(i):
        phases(made[0][1], made[0][0], i)
        made[0][1].step()

    step = torch.compile(made[0][1].step, backend="eager")
    loop = torch.compile(loop, backend="eager")
    for i in range(3):
        phases(made[1][1], made[1][0], i)
        made[1][1].step()
        if what == "loop":
            loop(i)
        else:
            phases(made[0][1], made[0][0], i)
            step()
    assert_same(*(snapshot(opt, m) for m, opt in made))
    torch._dynamo.reset()
