"""The option that brings back what a method's released code does and its paper does not say."""

from __future__ import annotations


def compat(value: str | None) -> bool:
    """True for "paper", False for None.

    Raises:
        ValueError: it is neither.
    """
    if value not in (None, "paper"):
        raise ValueError(f"compat must be one of 'paper'; got {value!r}")
    return value is not None
