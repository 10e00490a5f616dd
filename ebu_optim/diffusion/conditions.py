"""Conditions: labels, or a model's keyword arguments.

The keyword arguments may hold tensors with one row per image in mappings, lists and tuples, such
as SDXL's ``added_cond_kwargs``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Condition = Tensor | Mapping[str, Any]

_MISSING = object()


def rows(condition: Any) -> int | None:
    """Return the number of rows of the first tensor that has rows; None if there is none."""
    if isinstance(condition, Tensor):
        return len(condition) if condition.dim() else None
    parts = condition.values() if isinstance(condition, Mapping) else condition
    if not isinstance(condition, (Mapping, list, tuple)):
        return None
    return next((n for part in parts if (n := rows(part)) is not None), None)


def moved(condition: Any, device: Any) -> Any:
    """Return the condition with every tensor on `device`."""
    if isinstance(condition, Tensor):
        return condition.to(device)
    if isinstance(condition, Mapping):
        return {k: moved(v, device) for k, v in condition.items()}
    if isinstance(condition, (list, tuple)):
        return _like(condition, [moved(v, device) for v in condition])
    return condition


def behind(null: Any, condition: Any, n: int, at: str = "null_condition") -> Any:
    """Concatenate null and condition, for one pass of guidance over 2 n images.

    A value without rows is the same for all images: it is taken from the condition, and null may
    leave it out.

    Raises:
        ValueError: null does not have the structure of the condition; the message names the place.
    """
    if isinstance(condition, Tensor) and condition.dim():
        if len(condition) != n:
            raise ValueError(
                f"the condition at {at} has {len(condition)} rows for {n} images; give one row per "
                "image"
            )
        if not isinstance(null, Tensor) or null.shape != condition.shape:
            one = "one label or " if at == "null_condition" else ""
            raise ValueError(f"{at} must be {one}{n} rows; got {_rows_of(null, condition)}")
        return torch.cat([null.to(condition), condition])
    if rows(condition) is None:
        if isinstance(condition, (bool, int, float, str)) and null not in (_MISSING, condition):
            raise ValueError(
                f"{at} is {null!r}, but the condition's is {condition!r}; one pass needs one value"
            )
        return condition
    if isinstance(condition, Mapping):
        if not isinstance(null, Mapping):
            raise ValueError(f"{at} must be a mapping like the condition; give the same keys")
        if unknown := null.keys() - condition.keys():
            raise ValueError(f"{at} has {sorted(unknown)}, which the condition lacks; remove them")
        return {
            k: behind(null.get(k, _MISSING), v, n, f"{at}[{k!r}]") for k, v in condition.items()
        }
    if not isinstance(null, (list, tuple)) or len(null) != len(condition):
        raise ValueError(f"{at} must have {len(condition)} values, like the condition")
    both = (behind(a, b, n, f"{at}[{i}]") for i, (a, b) in enumerate(zip(null, condition)))
    return _like(condition, list(both))


def _rows_of(null: Any, condition: Tensor) -> str:
    if null is _MISSING:
        return "none"
    if not isinstance(null, Tensor):
        return f"a {type(null).__name__}"
    if null.dim() and len(null) != len(condition):
        return f"{len(null)} rows"
    return f"shape {tuple(null.shape)}, the condition's is {tuple(condition.shape)}"


def _like(condition: Sequence[Any], parts: list[Any]) -> Any:
    named = hasattr(condition, "_fields")
    return type(condition)(*parts) if named else type(condition)(parts)  # type: ignore[call-arg]
