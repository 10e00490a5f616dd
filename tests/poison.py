"""Memory that torch leaves unwritten, as NaN: what a kernel forgets to write then shows."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch


def _poisoned(make):
    def made(*args, **options):
        t = make(*args, **options)
        if t.is_floating_point() or t.is_complex():
            t.fill_(math.nan)
        return t

    return made


@pytest.fixture(autouse=True, scope="module")
def poison():
    """torch.empty, empty_like and Tensor.new_empty return NaN, in every test of the module that
    imports this fixture."""
    with (
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ):
        yield
