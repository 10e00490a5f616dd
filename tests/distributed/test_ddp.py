"""DistributedDataParallel in real processes is one process on the joined batch."""

from __future__ import annotations

import math

import pytest
import torch

from ..steps import assert_same
from .launch import outcomes
from .training import EQUAL, ORDERS, STEPS, train

RANKS = [2, 4]
TRAINS = [f"train {wrap}" for wrap in EQUAL]
ACCUMULATES = [f"accumulate {wrap} {o}" for wrap in ("plain", "view", "view+tiny") for o in ORDERS]
OTHERS = ["float32", "freeze", "warmup"]


@pytest.fixture(scope="module", params=RANKS, ids=lambda n: f"{n}ranks")
def ranks(request, tmp_path_factory):
    """Every scenario in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    return outcomes(request.param, "worker", folder, *TRAINS, *ACCUMULATES, *OTHERS)


def alone(scenario: str):
    """The same run as one process on the joined batch, without micro-batches."""
    options = {
        "float32": {"dtype": torch.float32},
        "freeze": {"unrelated": "freeze"},
        "warmup": {"warmup": True},
    }
    kind, *rest = scenario.split()
    return train(rest[0] if kind in ("train", "accumulate") else "plain", **options.get(kind, {}))


@pytest.mark.parametrize("scenario", [*TRAINS, *ACCUMULATES, *OTHERS])
def test_ranks_are_equal_bit_for_bit_and_one_process_on_the_joined_batch(ranks, scenario):
    first, *others = (results[scenario] for results in ranks)
    assert len(first) == STEPS
    for other in others:  # weights, F, thresholds and all other figures, masks
        assert_same(first, other)
    one = alone(scenario)
    rtol, atol = (1e-4, 1e-6) if scenario == "float32" else (1e-9, 1e-12)
    for got, want in zip(first, one, strict=True):
        for what in ("weights", "fisher"):
            torch.testing.assert_close(got[what], want[what], rtol=rtol, atol=atol)
        assert_same(got["masks"], want["masks"])
        for name, value in want["stats"].items():
            expected = pytest.approx(value, rel=1e3 * rtol, abs=atol)
            assert got["stats"][name] == expected or math.isnan(value), name
    assert not torch.equal(one[0]["weights"][0], one[-1]["weights"][0])
