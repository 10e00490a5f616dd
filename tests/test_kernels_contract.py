"""The contract: keys, columns, and the weights of every reading of the update."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ebu_optim.kernels import contract, reference
from ebu_optim.kernels.contract import Columns, Update

from .poison import poison  # noqa: F401

OPTIONS = {"gamma": 1.0, "online": None, "inv_scale": None, "dtype": torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_order_as_magnitudes_with_nan_above_inf(dtype):
    x = torch.tensor([0.0, -0.0, 1e-45, -1.0, 2.0, -math.inf, math.nan], dtype=dtype)
    keys = contract.keys(x, dtype)
    assert keys[0] == keys[1] == 0
    assert (keys[1:].diff() >= 0).all()
    keys = keys.tolist()
    assert keys[5] == contract.key_of_inf(dtype) < keys[6] < 1 << contract.key_bits(dtype)
    assert contract.key_to_value(torch.tensor(keys[4]), dtype) == 2.0


def test_rows_are_the_same_parameters_of_every_column():
    columns = Columns(*([f"{name} {i}" for i in range(4)] for name in Columns._fields))
    picked = columns.rows([3, 1])
    assert picked == Columns(*([f"{name} 3", f"{name} 1"] for name in Columns._fields))
    assert picked.tensors == tuple(picked)[:7]


@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_weights_give_what_the_specification_computes(update, alpha):
    """One scalar in each region, every choice of terms; without a penalty."""
    f, r = torch.tensor([5.0, 5.0, 1.0, 1.0]), torch.tensor([7.0, 2.0, 7.0, 2.0])
    m_f, m_r = (f > 3).float(), (r > 3).float()
    both = m_f * m_r
    for terms in itertools.product((True, False), repeat=3):
        if update == "routed" and not all(terms):
            continue
        how = Update(alpha=alpha, penalty="none", update=update, terms=terms, **OPTIONS)
        w = how.weights()
        G = w.on_f * f + w.on_r * r + w.on_m * m_f * f + w.only_r * (m_r - both) * r
        G = G + w.blend * both * (r - f)
        taus = contract.keys(torch.tensor([5.0, 7.0]), torch.float32).long()
        out, none = [torch.zeros(4)], [None]
        columns = Columns([torch.ones(4)], [f], [r], none, none, out, none, [0], [1])
        reference.combine(columns, taus, how, torch.zeros(len(contract.STATS)).double())
        torch.testing.assert_close(out[0], G)


@pytest.mark.parametrize(("remember", "penalty"), [(True, "full"), (False, "none")])
def test_penalty_is_part_of_the_remember_term(remember, penalty):
    how = Update(0.6, penalty="full", update="added", terms=(True, remember, True), **OPTIONS)
    assert how.weights().penalty == penalty
