"""Confidence intervals of figures that are measured on n images.

They say how much a figure would change with other images sampled from the same model. The spread
over seeds of unlearning is something else.
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
    """Return Wilson's score interval of the share `hits` / `n`, which is valid at 0 and 1 too.

    Raises:
        ValueError: not 0 <= hits <= n, n < 1, or a confidence outside (0, 1).
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits must be in 0..n and n >= 1; got hits={hits}, n={n}")
    z = NormalDist().inv_cdf((1 + _confidence(confidence)) / 2)
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at the ends, where rounding would give 1e-17
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return low, 1.0 if hits == n else min(1.0, centre + half)


def bootstrap(
    values: Tensor, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` (n,); width 0 at n = 1.

    It uses its own generator, and gathers n * resamples values in pieces.
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
    """Return Student's t interval of the mean of a few values, such as one per seed.

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
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
    """Return the mean of one value per image, (n,): ``value``, ``low``, ``high`` and ``n``.

    The interval is Wilson's if the values are bool, so that the mean is a share; else a bootstrap.
    """
    low, high = (
        wilson(int(values.sum()), len(values), confidence=confidence)
        if values.dtype == torch.bool
        else bootstrap(values, confidence=confidence, seed=seed)
    )
    return {"value": float(values.double().mean()), "low": low, "high": high, "n": len(values)}


def mean_said(values: Sequence[float], digits: int) -> str:
    """The mean of values, one for each seed, ± half its 95 % interval; of one value itself."""
    mean = f"{fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    low, high = t_interval(values)
    return f"{mean} ± {(high - low) / 2:.{digits}f}"
