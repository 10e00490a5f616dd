"""The option that restores what a method's released code does where its paper says otherwise."""

from __future__ import annotations


def compat(value: str | None) -> bool:
    """Return True for "paper" and False for None.

    Raises:
        ValueError: `value` is neither.
    """
    if value not in (None, "paper"):
        raise ValueError(f"compat must be 'paper' or None; got {value!r}")
    return value is not None
