"""Constants of the kernels, small enough for tests."""

from __future__ import annotations

import os

import pytest

from ebu_optim.kernels import _launch, _launch_plan, _launch_selection, _tables

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

CONSTANTS = (
    (_tables, "CHUNK", 128),
    (_launch, "TILE", 64),
    (_launch_plan, "WINDOW_MIN", 1 << 40),
    (_launch_plan, "WINDOW_MIN_16", 1 << 40),
    (_launch_selection, "RADIX_TILE", 64),
    (_launch_selection, "RADIX_PROGRAMS", 3),
)


@pytest.fixture(autouse=True, scope="module")
def _fused():
    """Tiny chunks and no windows, also for the tests imported from other files."""
    with pytest.MonkeyPatch.context() as patch:
        for constant in CONSTANTS:
            patch.setattr(*constant)
        yield


@pytest.fixture
def windows(monkeypatch):
    """Every pool has a window."""
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN", 1)
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN_16", 1)
    monkeypatch.setattr(_launch_plan, "SAMPLE_MIN", 6000)


@pytest.fixture
def launched(monkeypatch):
    """The kernels' names in the order of their launches; none runs."""
    calls = []

    class Kernels:
        def __getattr__(self, name):
            class Kernel:
                def __getitem__(self, grid):
                    assert all(0 < n < 2**31 for n in grid)
                    return lambda *args, **options: calls.append(name)

            return Kernel()

    monkeypatch.setattr(_launch, "kernels", Kernels)
    return calls
