"""Which of the methods need TorchJD, and whether it is here with what each of them needs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pytest

#: Method: what its weighting needs, beside torchjd.
WEIGHTINGS = {
    "upgrad": ("quadprog", "qpsolvers"),
    "mgda": (),
    "imtl_g": (),
    "aligned_mtl": (),
    "fairgrad": ("scipy",),
}


def lacks(name: str) -> list[str]:
    """The packages that a method needs and that are not installed."""
    needed = ("torchjd", *WEIGHTINGS[name]) if name in WEIGHTINGS else ()
    return [package for package in needed if find_spec(package) is None]


def runnable(names: Iterable[str]) -> list[Any]:
    """As parameters of a test, which is skipped where a package is missing."""
    return [
        pytest.param(
            n, marks=pytest.mark.skipif(bool(lacks(n)), reason=f"not installed: {lacks(n)}")
        )
        for n in names
    ]
