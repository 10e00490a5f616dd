"""Slots: every parameter once, known again until a group or a parameter is another."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from ebu_optim.optim._slots import Slots

from ..steps import NAMES


def parameters(n: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(i + 1)) for i in range(n)]


def test_places_names_and_groups():
    a, b, c = parameters(3)
    base = SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    slots = Slots(lambda: base.param_groups)()
    assert [s.key for s in slots] == [(0, 0), (0, 1), (1, 0)]
    assert [s.name for s in slots] == [
        "parameter 0 (group 0)", "parameter 1 (group 0)", "parameter 2 (group 1)",
    ]  # fmt: skip
    assert all(s.group is base.param_groups[s.key[0]] for s in slots)
    assert [s.param for s in slots] == [a, b, c]


@NAMES
def test_names_are_those_that_the_base_was_given():
    m = nn.Linear(2, 1)
    base = SGD(m.named_parameters(), lr=0.1)
    assert [s.name for s in Slots(lambda: base.param_groups)()] == ["weight", "bias"]


def test_a_tied_parameter_counts_once():
    a, b = parameters(2)
    groups = [{"params": [a, b, a]}, {"params": [b]}]
    assert [s.key for s in Slots(lambda: groups)()] == [(0, 0), (0, 1)]


def test_they_are_kept_until_a_group_or_a_parameter_is_another():
    a, b, c = parameters(3)
    groups = [{"params": [a, b]}]
    slots = Slots(lambda: groups)
    first = slots()
    assert slots() is first
    groups[0]["params"][1] = c
    assert [s.param for s in slots()] == [a, c]
    groups.append({"params": [b]})
    assert [s.key for s in slots()] == [(0, 0), (0, 1), (1, 0)]
    groups[1] = dict(groups[1])  # an equal group that is another object
    assert slots()[2].group is groups[1]
