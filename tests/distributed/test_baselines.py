"""Every baseline in two processes is one process on the joined batch."""

from __future__ import annotations

import math

import pytest
import torch

from ..steps import HAS_NAMES, assert_same
from .baselines import NAMES, train
from .launch import outcomes

HAS_SHARDS = HAS_NAMES  # both came with torch 2.6
WRAPS = ["ddp fr", "ddp rf", *(["fsdp fr"] if HAS_SHARDS else [])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    wraps = ["fsdp"] if HAS_SHARDS else []
    return outcomes(2, "baselines", tmp_path_factory.mktemp("ranks"), *wraps)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_equal_and_one_process_on_the_joined_batch(ranks, name, wrap):
    if (name, wrap) == ("random_masks", "fsdp fr"):
        assert "the parameters are sharded" in ranks[0]["refused"]
        return
    first, second = (results[f"{name} {wrap}"] for results in ranks)
    assert_same(first, second)
    one = train(name, "", ("forget", "remember"))
    for got, want in zip(first, one, strict=True):
        torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-9, atol=1e-12)
        for key, value in want["stats"].items():
            assert got["stats"][key] == pytest.approx(value, rel=1e-8) or math.isnan(value), key


@pytest.mark.skipif(not HAS_SHARDS, reason="the shards of torch before 2.6 are refused")
@pytest.mark.parametrize("name", ["joint", "salun"])
def test_nan_in_one_ranks_part_stops_all_of_them(ranks, name):
    """At the first look already: who goes on would wait for the others."""
    results = [rank[f"nan {name}"] for rank in ranks]
    for result in results:
        (error,) = result["errors"]
        assert "1 elements of the forget gradient, 0 of the remember gradient" in error
        assert all(w.isfinite().all() for w in result["weights"])
    assert_same(*results)
