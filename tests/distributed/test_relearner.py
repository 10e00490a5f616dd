"""A relearner of several processes moves them all alike, by what all of them have."""

from __future__ import annotations

import torch

from .launch import outcomes
from .relearner import trained


def test_ranks_move_alike_and_are_one_run(tmp_path):
    first, second = outcomes(2, "relearner", tmp_path)
    for a, b, alone in zip(first, second, trained(2, None), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone)
