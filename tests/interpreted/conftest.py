"""Constants of the kernels, small enough for tests."""

from __future__ import annotations

import os
from dataclasses import replace

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


def patched_once(interpreter):
    """Triton's interpreter replaces triton.language anew in every call of a function, which is a
    third of its time; once is enough."""
    plain, nothing, core = interpreter._patch_lang, interpreter._LangPatchScope, interpreter.tl.core

    def patched(fn):
        seen = [m for m in fn.__globals__.values() if m is core or m is interpreter.tl]
        return plain(fn) if any(core.is_builtin(m.load) for m in seen) else nothing()

    return patched


@pytest.fixture(autouse=True, scope="session")
def _asserted():
    """What TRITON_DEBUG=1 does on a card: `tl.device_assert`, and integers may not overflow."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, debug=True))
        if hasattr(interpreter, "_LangPatchScope"):
            patch.setattr(interpreter, "_patch_lang", patched_once(interpreter))
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
