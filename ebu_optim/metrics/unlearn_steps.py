"""unlearn_steps and UT: how long it takes until the class is almost forgotten.

The paper's columns RT (steps) and UT (seconds) are those of the whole run, whose length the author
chose. These figures are measured: until P_f has made 95 % of its way from the base's value to a
stated level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def crossing(
    points: Sequence[tuple[float, float, float]], threshold: float, *, rising: bool = False
) -> tuple[float, float] | None:
    """Return where a polyline of (step, seconds, value) first meets the threshold: (step, seconds).

    Return None if it never does. Between two points, value and seconds are linear in step.
    """
    sign = 1.0 if rising else -1.0
    before: tuple[float, float, float] | None = None
    for step, seconds, value in points:
        if sign * (value - threshold) >= 0:
            if before is None:
                return step, seconds
            s, t, v = before
            part = (threshold - v) / (value - v)
            return s + part * (step - s), t + part * (seconds - t)
        before = step, seconds, value
    return None


def _points(curve: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    if not curve:
        raise ValueError("curve holds no point; measure P_f at some steps, including step 0")
    points: list[tuple[float, float, float]] = []
    for i, row in enumerate(curve):
        lacking = [k for k in ("step", "seconds", "p_f") if k not in row]
        if lacking:
            raise ValueError(f"point {i} of curve lacks {', '.join(lacking)}; it has {list(row)}")
        point = float(row["step"]), float(row["seconds"]), float(row["p_f"])
        if not all(map(math.isfinite, point)):
            raise ValueError(f"point {i} of curve holds NaN or Inf: {point}; the run diverged")
        if points and (point[0] <= points[-1][0] or point[1] < points[-1][1]):
            raise ValueError(
                f"curve must go forward in step and seconds; point {i} is at {point[:2]} after "
                f"{points[-1][:2]}"
            )
        points.append(point)
    return points


def unlearn_steps(
    curve: Sequence[Mapping[str, Any]], *, base: float, level: float, share: float = 0.95
) -> dict[str, Any]:
    """Return steps and seconds until P_f has first made `share` of the way from `base` to `level`.

    P_f is interpolated linearly between the points. Its values after the first crossing change only
    ``stays``. The result has the resolution of the curve: measure often where P_f falls.

    Args:
        curve: mappings with ``step``, ``seconds`` and ``p_f``, in order. ``seconds`` are those of
            unlearning alone: stop the clock while you sample and classify.
        base: P_f of the model before unlearning. If the curve has no point at step 0, it begins
            with this value there.
        level: where P_f is going, the same for all methods that are compared: the score of noise
            (:func:`classifier_metrics`), or 0 with a reject class.
        share: the share of the way; 0.95.

    Returns:
        ``steps`` and ``seconds`` (both None if P_f does not get there), ``reached``,
        ``threshold``, ``within`` and ``within_seconds`` (the last point measured; if not
        reached, the figures are "more than" these), ``stays`` (whether all later points are under
        the threshold too; None if not reached).

    Raises:
        ValueError: the curve is empty, goes backwards, or holds NaN; the level is not below
            `base`.
    """
    points = _points(curve)
    if not (math.isfinite(base) and math.isfinite(level) and level < base):
        raise ValueError(
            f"level must be below base, the P_f before unlearning; got level={level}, base={base}. "
            "If noise scores more than the base model, use a classifier with a reject class"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1]; got {share}")
    threshold = base - share * (base - level)
    if points[0][0] > 0:
        points = [(0.0, 0.0, base), *points]
    first = crossing(points, threshold)
    stays = None
    if first is not None:
        stays = all(p <= threshold for step, _, p in points if step >= first[0])
    return {
        "steps": None if first is None else first[0],
        "seconds": None if first is None else first[1],
        "reached": first is not None,
        "threshold": threshold,
        "within": points[-1][0],
        "within_seconds": points[-1][1],
        "stays": stays,
    }
