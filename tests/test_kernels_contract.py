"""The contract: keys, columns, and the weights of every reading of the update."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ebu_optim.kernels import contract
from ebu_optim.kernels.contract import Columns, Weights

from .poison import poison  # noqa: F401


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
def test_weights_give_what_the_equations_do(update, alpha):
    """One scalar in each region, every choice of terms; without a penalty."""
    f, r = torch.tensor([5.0, 5.0, 1.0, 1.0]), torch.tensor([7.0, 2.0, 7.0, 2.0])
    m_f, m_r = (f > 3).float(), (r > 3).float()
    both = m_f * m_r
    b = alpha * f + (1 - alpha) * r
    m = both * b + (m_f - both) * f
    for terms in itertools.product((True, False), repeat=3):
        if update == "routed" and not all(terms):
            continue
        w = Weights.reading(alpha=alpha, penalty="none", update=update, terms=terms)
        G = w.on_f * f + w.on_r * r + w.on_m * m_f * f + w.only_r * (m_r - both) * r
        G = G + w.blend * both * (r - f)
        first = both * b + (1 - both) * f if update == "replaced" else f
        summed = sum(on * part for on, part in zip(terms, (first, r, m), strict=True))
        want = m + (m_r - both) * r if update == "routed" else summed
        torch.testing.assert_close(G, want)


@pytest.mark.parametrize(("remember", "penalty"), [(True, "full"), (False, "none")])
def test_penalty_is_part_of_the_remember_term(remember, penalty):
    weights = Weights.reading(
        alpha=0.6, penalty="full", update="added", terms=(True, remember, True)
    )
    assert weights.penalty == penalty
