"""Pieces, packs and buffers: each element once, and memory that shows what was not written."""

from __future__ import annotations

import pytest
import torch

from ebu_optim.kernels import _pieces

from .inputs import LAYOUTS, constants, lay_out
from .poison import poison  # noqa: F401


def test_unwritten_memory_is_nan_in_the_tests_of_the_kernels():
    rows = _pieces.Rows()
    like = torch.ones(5)
    for t in (torch.empty(3), torch.empty_like(like), like.new_empty(2), rows("buffer", like)):
        assert t.isnan().all()
    assert torch.empty(3, dtype=torch.int32).shape == (3,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pieces_cover_each_element_of_every_column_once(layout, chunk):
    first = lay_out(torch.arange(60.0).view(3, 4, 5, 1), layout)
    second = -torch.arange(60.0).view(3, 4, 5, 1)
    if layout == "expanded":
        first = second.clone().abs()
        second = torch.zeros(()).expand(first.shape)
    seen = []
    for a, b in _pieces.pieces([first, second], chunk):
        assert a.shape == b.shape
        assert 0 < a.numel() <= chunk
        seen += zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    assert sorted(seen) == sorted(zip(first.flatten().tolist(), second.flatten().tolist()))


def test_packs_share_dtypes_and_tags_and_fit_one_chunk():
    tensors = [torch.full((3,), float(i)) for i in range(6)]
    tensors[3] = tensors[3].half()
    with constants({"CHUNK_CPU": 7}):
        found = list(_pieces.packs([(t,) for t in tensors], [0, 0, 0, 0, 0, 1]))
    assert [tag for tag, _ in found] == [0, 0, 0, 0, 1]
    assert [[float(t[0]) for (t,) in pack] for _, pack in found] == [[0, 1], [2], [3], [4], [5]]


def test_parts_are_the_pieces_shares_of_a_row():
    like = [torch.ones(2, 3), torch.ones(()), torch.ones(0), torch.ones(4)]
    parts = list(_pieces.parts(like, torch.arange(11.0)))
    assert all(a is b and p.shape == b.shape for (a, p), b in zip(parts, like))
    assert torch.cat([p.flatten() for _, p in parts]).tolist() == list(range(11))


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.ones(3, 4), 1),
        (torch.ones(3, 4).mT, 1),
        (torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 1),
        (torch.ones(3, 8)[:, :4], None),
        (torch.ones(8)[::2], None),
        (torch.ones(()).expand(3, 4), 0),
        (torch.ones(4).expand(3, 4), None),
        (torch.ones(()), 1),
        (torch.ones(0, 3), 1),
    ],
)
def test_layouts_that_are_one_stretch_of_memory(tensor, stride):
    assert _pieces.flat_stride(tensor) == stride
