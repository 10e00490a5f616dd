"""Methods compared over seeds: means with their intervals, and differences seed by seed.

A cell is a number, a mapping with a "value" (and an interval over images), or a mapping with the
reason why there is no value (``{"not_computed": why}``).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics.intervals import t_interval
from .cells import measure


def value(cell: Any) -> float | None:
    """Return a cell as a number; None if it has no number."""
    cell = cell.get("value") if isinstance(cell, Mapping) else cell
    return float(cell) if isinstance(cell, (int, float)) else None


def over_seeds(cells: Sequence[Any], key: str) -> Any:
    """Return the cell of several seeds.

    Args:
        cells: one per seed. A single cell is returned unchanged, with its interval over images.
        key: the measure. For cells that say whether something was ``reached``, "ut" takes their
            seconds and any other key their steps.

    Returns:
        The mean with its 95 % interval (Student's t) and ``n``; "> most in m of n" if some runs did
        not reach what is counted; ``{"not_computed": why}`` if some seeds have no value, because
        the mean of the others would not be that of all.
    """
    if len(cells) == 1:
        return cells[0]
    lacking = [v for v in cells if v is None or (isinstance(v, Mapping) and "not_computed" in v)]
    if len(lacking) == len(cells):
        return cells[0]
    if lacking:
        why = lacking[0]["not_computed"] if lacking[0] else "it has no such value"
        return {"not_computed": f"in {len(lacking)} of {len(cells)} seeds: {why}"}
    if isinstance(cells[0], Mapping) and "reached" in cells[0]:
        what, within = ("seconds", "within_seconds") if key == "ut" else ("steps", "within")
        there = [v[what] for v in cells if v["reached"]]
        if len(there) < len(cells):
            most = max(v[within] for v in cells)
            return f"> {most:g} in {len(cells) - len(there)} of {len(cells)}"
        return _interval(there)
    return _interval([v["value"] if isinstance(v, Mapping) else v for v in cells])


def rows_over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the rows of one method, one per seed, into one row by `over_seeds` of every measure."""
    keys = dict.fromkeys(k for row in rows for k in row)
    return {k: over_seeds([row.get(k) for row in rows], k) for k in keys}


def difference(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> str:
    """Return, as text, by how much the first method exceeds the second, seed by seed.

    Args:
        first, second: their rows, one per seed, in the same order of seeds.
        keys: the measures; a measure that is missing in a seed is left out.

    Returns:
        "label +0.040 [+0.010, +0.070]; ...": the mean and its 95 % interval over the seeds.
    """
    said = []
    for key in keys:
        pairs = [(value(a.get(key)), value(b.get(key))) for a, b in zip(first, second, strict=True)]
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        if len(gaps) == len(pairs):
            low, high = t_interval(gaps)
            mean = statistics.fmean(gaps)
            said.append(f"{measure(key).label} {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return "; ".join(said)


def _interval(values: Sequence[float]) -> dict[str, float]:
    low, high = t_interval(values)
    return {"value": statistics.fmean(values), "low": low, "high": high, "n": len(values)}
