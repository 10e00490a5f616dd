"""Confidence intervals of what is measured on n images: they say how far the images alone, drawn
anew from the same model, would move a figure. The spread over seeds of unlearning is another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch
from torch import Tensor

from .._extras import require


def _confidence(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"confidence must be in (0, 1), such as 0.95; got {value}")
    return value


def wilson(hits: int, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share `hits` / `n`; honest at 0 and at 1 too.

    Raises:
        ValueError: not 0 <= hits <= n, n < 1, or a confidence outside (0, 1).
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits must be in 0..n and n >= 1; got hits={hits}, n={n}")
    z = NormalDist().inv_cdf((1 + _confidence(confidence)) / 2)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at the ends, where rounding would leave 1e-17
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return low, 1.0 if hits == n else min(1.0, centre + half)


def bootstrap(
    values: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (n,); no width at n = 1.

    Draws from a generator of its own; n * resamples gathers, in pieces.
    """
    if values.dim() != 1 or not len(values):
        raise ValueError(
            f"values must have shape (n,) with n > 0, one per image; got {tuple(values.shape)}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1; got {resamples}")
    tail = (1 - _confidence(confidence)) / 2
    values = values.detach().cpu().double()
    n, g = len(values), torch.Generator().manual_seed(seed)
    piece = max(1, 4_000_000 // n)
    means = torch.cat(
        [
            values[torch.randint(n, (min(piece, resamples - i), n), generator=g)].mean(dim=1)
            for i in range(0, resamples, piece)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of a few values, such as one a seed.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
        ImportError: scipy is missing.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"values must be at least two finite numbers; got {list(values)}")
    stats = require("scipy.stats", "metrics")  # torch-fidelity brings it
    mean = fmean(values)
    half = stats.t.ppf((1 + _confidence(confidence)) / 2, len(values) - 1)
    half = float(half) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def estimate(values: Tensor, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """The mean of one value an image, (n,), with its interval: ``value``, ``low``, ``high``, ``n``.

    Wilson's interval where the values are bool, so that the mean is a share; else a bootstrap's.
    """
    low, high = (
        wilson(int(values.sum()), len(values), confidence=confidence)
        if values.dtype == torch.bool
        else bootstrap(values, confidence=confidence, seed=seed)
    )
    return {"value": float(values.double().mean()), "low": low, "high": high, "n": len(values)}
