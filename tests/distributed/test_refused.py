"""What holds shards in another way is refused by name; a rank that is lost ends the others."""

from __future__ import annotations

import time

import pytest
import torch

from .launch import torchrun
from .refused import CASES


def test_shards_are_refused_by_name_on_every_rank(tmp_path):
    done = torchrun(2, "--module", "tests.distributed.refused", tmp_path)
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        refusals = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in CASES:
            assert refusals[name].startswith("TypeError: "), name
            assert name.split()[0].replace("FSDP1", "FullyShardedDataParallel") in refusals[name]
            assert "fully_shard" in refusals[name], name


@pytest.mark.parametrize("what", ["dies", "stays away"])
def test_a_lost_rank_ends_the_others(what, tmp_path):
    """In DDP's reduction, or in the comparison of the step it stays away from."""
    start = time.monotonic()
    done = torchrun(2, "--module", "tests.distributed.lonely", what, tmp_path, timeout=60)
    assert done.returncode != 0
    assert time.monotonic() - start < 40
    if what == "stays away":
        seconds, error = (tmp_path / "0.txt").read_text().split(" ", 1)
        assert float(seconds) < 15
        assert "Timed out" in error or "Connection" in error or "timeout" in error.lower()
