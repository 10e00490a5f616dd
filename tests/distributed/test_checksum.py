"""The checksum of the rank checks: reads everything, writes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from ebu_optim.kernels import _pieces
from ebu_optim.optim._ranks import _checksum

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5,), (), (0,), (2, 3, 2, 2))
    made = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return [*made[:-1], made[-1].to(memory_format=torch.channels_last)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_writes_nothing_and_sees_every_bit(dtype):
    given = tensors(dtype)
    before = copy.deepcopy(given)
    first = _checksum(given, CPU)
    assert first.dtype == torch.int64
    assert all(map(torch.equal, before, given))
    assert torch.equal(_checksum(given, CPU), first)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    seen = {int(first)}
    for i, t in enumerate(given):
        for place in range(t.numel()):
            other = copy.deepcopy(given)
            flat = other[i].reshape(-1).clone()
            flat.view(bits)[place] ^= 1
            other[i] = flat.view(t.shape)
            seen.add(int(_checksum(other, CPU)))
    assert len(seen) == 1 + sum(t.numel() for t in given)


def test_it_sees_places_signs_and_none():
    a, b = torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.zeros(2)
    cases = [[a, b], [-a, b], [b, a], [a, None], [None, b], [None, None], [a.roll(1), b]]
    cases += [[a, b, b], [torch.cat([a, b])], [a, -b]]
    assert len({int(_checksum(c, CPU)) for c in cases}) == len(cases)


def test_it_does_not_depend_on_the_chunks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(1000, generator=g), torch.zeros(()).expand(300)]
    whole = _checksum(given, CPU)
    monkeypatch.setattr(_pieces, "CHUNK_CPU", 64)
    assert torch.equal(_checksum(given, CPU), whole)
