"""An adversary of several processes is one, on what all of them attack with."""

from __future__ import annotations

import torch

from .adversary import trained
from .launch import outcomes


def test_ranks_have_the_same_embeddings_and_draws_of_their_own(tmp_path):
    first, second = outcomes(2, "adversary", tmp_path)
    assert torch.equal(first["vectors"], second["vectors"])
    torch.testing.assert_close(first["vectors"], trained(2, None))
    assert not torch.equal(first["drawn"], second["drawn"])
