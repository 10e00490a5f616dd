"""The statistics of a step, in the units of the paper's Table 5 and of docs/method.md."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..kernels.reference import STATS


def read_stats(last: tuple[Tensor, Tensor, int] | None, counted: bool = True) -> dict[str, Any]:
    """Return the statistics of the last accepted step; {} before the first.

    If the statistics of the two gradients and the masks were not `counted`, the result has only
    total, update_norm and thresholds.

    ======================== ==================================================================
    total                    N, number of scalars that had a gradient
    forget_selected          size of M_f; remember_selected: of M_r; overlap: of both
    overlap_lift             overlap / (|M_f| |M_r| / N); 1 is chance
    overlap_opposed          share of the overlap where g_f and g_r have opposite signs
    cosine                   cosine of g_f and g_r over all scalars
    forget_norm, ...         2-norms of g_f, g_r, and of G before clipping
    thresholds               tau_f then tau_r, one of each for every set ranked together
    moved_<region>           ||theta - theta0|| before the step by region (if theta0 is held)
    ======================== ==================================================================
    """
    if last is None:
        return {}
    vector, thresholds, total = last
    raw = dict(zip(STATS, vector.tolist(), strict=True))
    if not counted:
        norm = math.sqrt(raw["update_sq"])
        return {"total": total, "update_norm": norm, "thresholds": thresholds.tolist()}
    selected = raw["forget_selected"] * raw["remember_selected"]
    norms = math.sqrt(raw["forget_sq"]) * math.sqrt(raw["remember_sq"])
    stats: dict[str, Any] = {
        "total": total,
        "forget_selected": int(raw["forget_selected"]),
        "remember_selected": int(raw["remember_selected"]),
        "overlap": int(raw["overlap"]),
        "overlap_lift": raw["overlap"] * total / selected if selected else math.nan,
        "overlap_opposed": raw["overlap_opposed"] / raw["overlap"] if raw["overlap"] else math.nan,
        "cosine": raw["dot"] / norms if norms else math.nan,
        "forget_norm": math.sqrt(raw["forget_sq"]),
        "remember_norm": math.sqrt(raw["remember_sq"]),
        "update_norm": math.sqrt(raw["update_sq"]),
        "thresholds": thresholds.tolist(),
    }
    for region in ("forget_only", "remember_only", "overlap", "unrelated"):
        stats[f"moved_{region}"] = math.sqrt(raw[f"moved_{region}_sq"])
    return stats
