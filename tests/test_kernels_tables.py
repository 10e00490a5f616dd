"""Tables of chunks: every element once, launches over what lies together, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ebu_optim.kernels import _tables, contract


@pytest.fixture(autouse=True)
def _empty(monkeypatch):
    """Nothing is kept from other tests, nor for them."""
    monkeypatch.setattr(_tables, "_cache", type(_tables._cache)())
    monkeypatch.setattr(_tables, "_captured", [])


def test_tables_address_every_element_once_past_32_bits_too():
    sizes = np.array([3_000_000_000, 0, 5, 65536, 65537])
    kinds = np.array([[0, 0, 1, 2, 2], [1, 1, 1, -1, 0]])
    strides = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])
    addresses = np.array([[1 << 40, 0, 48, 64, 66], [16, 0, 32, 0, 96]])
    row, at, length, full = _tables.split(addresses, kinds, strides, sizes, 1 << 16)
    assert at.dtype == np.int64
    assert np.bincount(row, weights=length).tolist() == sizes.tolist()
    first = row == 0
    ends = at[0, first] + 4 * length[first]
    assert (ends[:-1] == at[0, first][1:]).all()  # no gap, no overlap
    assert ends[-1] == (1 << 40) + 4 * 3_000_000_000
    assert (at[1, first] == 16).all()  # one value, expanded
    assert not full[first].any()
    assert full[row == 3].tolist() == [True]  # a missing column is no obstacle
    assert full[row == 4].tolist() == [False, False]  # 66 is no multiple of 16


def test_launches_are_the_runs_of_equal_columns():
    kinds = np.array([[0, 0, 0, 1, 1, 0], [2, 2, -1, -1, -1, -1]])
    got = _tables.launches(kinds, first=7)
    assert got == [((0, 2), 7, 2), ((0, -1), 9, 1), ((1, -1), 10, 2), ((0, -1), 12, 1)]
    assert _tables.launches(kinds[:, :0]) == []


def test_uploaded_parts_are_the_arrays():
    arrays = [np.arange(6).reshape(2, 3), np.array([True, False]), np.zeros((5, 0), np.int64)]
    parts, _ = _tables.upload(arrays, torch.device("cpu"))
    assert [p.tolist() for p in parts] == [a.astype(int).tolist() for a in arrays]
    assert all(p.dtype == torch.int64 for p in parts)
    assert contract.STATS[-1] == "update_nonfinite"  # the order that combine_kernel writes
    assert len(contract.STATS) == 14


def test_what_was_asked_for_last_is_kept(monkeypatch):
    monkeypatch.setattr(_tables, "_KEPT", 2)
    made = []
    for key in "abacab":
        assert (
            _tables.cached(key, torch.device("cpu"), lambda key=key: made.append(key) or key) == key
        )
    assert "".join(made) == "abcb"


def test_a_graphs_tables_are_kept_for_good_and_a_streams_are_its_own(monkeypatch):
    streams = SimpleNamespace(cuda_stream=1)
    capturing = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(_tables, "_KEPT", 1)
    cuda = torch.device("cuda", 0)
    first = _tables.cached("a", cuda, object)
    assert _tables.cached("a", cuda, object) is first
    assert _tables._captured == []
    capturing.append(True)
    for _ in range(2):
        assert _tables.cached("a", cuda, object) is first
    streams.cuda_stream = 2
    assert _tables.cached("a", cuda, object) is not first
    assert len(_tables._cache) == 1
    assert _tables._captured[0] is first
    assert len(_tables._captured) == 2
