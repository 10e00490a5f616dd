"""What holds shards in another way is refused by name; a rank that is lost ends the others."""

from __future__ import annotations

import pytest

from .launch import launch, outcomes
from .refused import CASES


def test_shards_are_refused_by_name_on_every_rank(tmp_path):
    for refusals in outcomes(2, "refused", tmp_path):
        for name in CASES:
            assert refusals[name].startswith("TypeError: "), name
            assert name.split()[0].replace("FSDP1", "FullyShardedDataParallel") in refusals[name]
            assert "fully_shard" in refusals[name], name


@pytest.mark.parametrize("what", ["dies", "stays away"])
def test_a_lost_rank_ends_the_others(what, tmp_path):
    """In DDP's reduction, or in the comparison of the step it stays away from."""
    done = launch(2, "lonely", what, tmp_path, alone=True)
    assert done.codes == ([1, 7] if what == "dies" else [1, 0]), done.said
    error = (tmp_path / "0.txt").read_text()
    assert "Timed out" in error or "Connection" in error or "timeout" in error.lower()
