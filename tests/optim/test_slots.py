"""Slots: every parameter once, known again until a group or a parameter is another."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import RandomMasks, SalUn
from ebu_optim.optim._slots import Slots

from ..steps import NAMES, assert_same


def parameters(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(i + 1)) for i in range(n)]


def test_places_names_and_groups():
    a, b, c = parameters(3)
    base = SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    slots = Slots(base)()
    assert [s.place for s in slots] == [(0, 0), (0, 1), (1, 0)]
    assert [s.name for s in slots] == [
        "parameter 0 (group 0)",
        "parameter 1 (group 0)",
        "parameter 2 (group 1)",
    ]
    assert all(s.group is base.param_groups[s.place[0]] for s in slots)
    assert [s.param for s in slots] == [a, b, c]


@NAMES
def test_names_are_those_that_the_base_was_given():
    m = nn.Linear(2, 1)
    base = SGD(m.named_parameters(), lr=0.1)
    assert [s.name for s in Slots(base)()] == ["weight", "bias"]


def test_a_tied_parameter_counts_once():
    a, b = parameters(2)
    groups = [{"params": [a, b, a]}, {"params": [b]}]
    assert [s.place for s in Slots(SimpleNamespace(param_groups=groups))()] == [(0, 0), (0, 1)]


def test_they_are_kept_until_a_group_or_a_parameter_is_another():
    a, b, c = parameters(3)
    groups = [{"params": [a, b]}]
    slots = Slots(SimpleNamespace(param_groups=groups))
    first = slots()
    assert slots() is first
    groups[0]["params"][1] = c
    assert [s.param for s in slots()] == [a, c]
    groups.append({"params": [b]})
    assert [s.place for s in slots()] == [(0, 0), (0, 1), (1, 0)]
    groups[1] = dict(groups[1])  # an equal group that is another object
    assert slots()[2].group is groups[1]


# -- what a tensor has moves with it ----------------------------------------------------------


def listed(opt):
    return [p for group in opt.param_groups for p in group["params"]]


def backward(opt, between=lambda opt: None):
    """A step on gradients of each parameter's own; the squares that F is to be the mean of."""
    for name, power in (("forget", 1), ("remember", 2)):
        with getattr(opt, name)():
            sum(
                (torch.arange(4.0) * p.detach().mean() * p**power).sum() for p in listed(opt)
            ).backward()
        if name == "forget":
            between(opt)
    squares = [(p, p.grad.square()) for p in listed(opt)]
    opt.step()
    opt.zero_grad()
    return squares


def three(make, **options):
    """Three parameters of one shape in two groups, and their optimizer."""
    ps = [nn.Parameter(torch.arange(4.0) + 10 * i) for i in range(3)]
    return make(SGD([{"params": ps[:2]}, {"params": ps[2:]}], lr=1e-3), **options), ps


def swap_groups(opt):
    opt.param_groups[:] = opt.param_groups[::-1]


def move(opt):
    one, two = opt.param_groups
    two["params"].insert(0, one["params"].pop())


def replace_a_group(opt):
    del opt.param_groups[0]
    opt.add_param_group({"params": [nn.Parameter(torch.full((4,), 9.0))]})


EDITS = {
    "a group deleted": lambda opt: opt.param_groups.pop(0),
    "a group filtered": lambda opt: opt.param_groups[0]["params"].pop(0),
    "a group reordered": lambda opt: opt.param_groups[0]["params"].reverse(),
    "groups swapped": swap_groups,
    "one moved to another group": move,
    "a new group after a deleted one": replace_a_group,
}
EDIT = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)


def assert_held(opt, squares, initial):
    for p in listed(opt):
        theta0 = initial.get(p, torch.full((4,), 9.0))
        assert torch.equal(opt.anchor_of(p), theta0)
        torch.testing.assert_close(
            opt.fisher_of(p), torch.stack([g for q, g in squares if q is p]).mean(0)
        )


@EDIT
@pytest.mark.parametrize("when", ["between steps", "between the phases"])
def test_theta0_and_F_follow_their_tensor(edit, when):
    opt, ps = three(EBUOptimizer)
    initial = {p: p.detach().clone() for p in ps}
    squares = backward(opt)
    if when == "between steps":
        edit(opt)
        squares += backward(opt)
    else:
        squares += backward(opt, edit)
    for _ in range(2):
        squares += backward(opt)
    assert_held(opt, squares, initial)
    means = torch.cat([opt.fisher_of(p) for p in listed(opt)]).mean()
    torch.testing.assert_close(opt._anchors.mean.float(), means)


def test_a_tensor_that_comes_back_has_its_theta0_and_F():
    opt, ps = three(EBUOptimizer)
    initial = {p: p.detach().clone() for p in ps}
    squares = backward(opt)
    opt.param_groups[0]["params"] = ps[1:2]
    squares += backward(opt)
    opt.param_groups[0]["params"] = ps[:2]
    squares += backward(opt)
    assert_held(opt, squares, initial)


@EDIT
def test_a_mask_follows_its_tensor(edit):
    opt, ps = three(SalUn, delta=0.3)
    backward(opt)
    masks = {p: opt.mask_of(p).clone() for p in ps}
    assert not torch.equal(masks[ps[0]], masks[ps[2]])
    opt.rule.mask, made = {}, opt.rule.mask  # else no group may be added
    edit(opt)
    opt.rule.mask = made
    before = [p.detach().clone() for p in ps]
    backward(opt)
    there = [i for i, p in enumerate(ps) if any(p is q for q in listed(opt))]
    for i in there:
        assert torch.equal(opt.mask_of(ps[i]), masks[ps[i]])
        assert torch.equal((ps[i] != before[i]), masks[ps[i]])


@EDIT
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_know_whose_state_is_whose(edit, how):
    opt, _ = three(EBUOptimizer)
    backward(opt)
    edit(opt)
    other = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))  # noqa: S301
    for which in (opt, other):
        backward(which)
    assert_same(opt.state_dict(), other.state_dict())
    assert_same(
        [opt.anchor_of(p) for p in listed(opt)], [other.anchor_of(p) for p in listed(other)]
    )


@EDIT
@pytest.mark.parametrize("make", [EBUOptimizer, RandomMasks])
def test_a_run_resumed_after_an_edit_is_the_same_run(edit, make):
    opt, _ = three(make)
    backward(opt)
    edit(opt)
    backward(opt)
    groups = [
        {**g, "params": [nn.Parameter(p.detach().clone()) for p in g["params"]]}
        for g in opt.param_groups
    ]
    other = make(SGD(groups, lr=0.5))
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for which in (opt, other):
        backward(which)
        backward(which)
    assert_same(opt.state_dict(), other.state_dict())
    assert_same(*([p.detach() for p in listed(which)] for which in (opt, other)))


def test_tensors_never_seen_take_the_places_of_those_that_are_gone():
    """As fully_shard replaces them; also where a group went at the same time."""
    for deleted in (False, True):
        opt, ps = three(EBUOptimizer)
        initial = [p.detach().clone() for p in ps]
        backward(opt)
        if deleted:
            del opt.param_groups[0]
        for group in opt.param_groups:
            group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        backward(opt)
        assert_same([opt.anchor_of(p) for p in listed(opt)], initial[2:] if deleted else initial)


def test_a_new_tensor_takes_no_place_whose_tensor_is_there_still():
    opt, ps = three(EBUOptimizer)
    backward(opt)
    new = [nn.Parameter(torch.full((4,), 7.0 + i)) for i in range(2)]
    opt.param_groups[0]["params"].insert(0, new[0])
    backward(opt)
    assert torch.equal(opt.anchor_of(new[0]), torch.full((4,), 7.0))
    assert torch.equal(opt.anchor_of(ps[0]), torch.arange(4.0))


@NAMES
def test_a_tensor_of_another_name_is_another_tensor():
    ps = [nn.Parameter(torch.arange(4.0) + 10 * i) for i in range(2)]
    opt = EBUOptimizer(SGD([("a", ps[0]), ("b", ps[1])], lr=1e-3))
    backward(opt)
    new = [nn.Parameter(torch.full((4,), 7.0 + i)) for i in range(2)]
    opt.param_groups[0].update(params=new, param_names=["c", "b"])
    backward(opt)
    assert torch.equal(opt.anchor_of(new[0]), torch.full((4,), 7.0))
    assert torch.equal(opt.anchor_of(new[1]), torch.arange(4.0) + 10)
