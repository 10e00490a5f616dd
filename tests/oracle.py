"""Steps 1 to 5 of docs/method.md in NumPy float64, over lists of arrays: the specification.

Written from the equations, not from the package; readable next to the paper. A missing gradient
is an array of zeros. alpha, delta and gamma may be lists, one value for each array.
"""

from __future__ import annotations

import math

import numpy as np

TERMS = ("forget", "remember", "modulated")


def threshold(grads, k):
    """tau: the exact k-th largest |g| over all arrays together; NaN ranks above Inf."""
    return np.sort(np.concatenate([np.abs(g).ravel() for g in grads]))[-k]


def select(grads, deltas, granularity="model"):
    """Masks and thresholds (eq. 10): arrays with one delta are ranked together, or each alone."""
    labels = list(range(len(grads))) if granularity == "tensor" else deltas
    masks, taus = [np.zeros(g.shape, bool) for g in grads], []
    for label in dict.fromkeys(labels):
        pool = [i for i, other in enumerate(labels) if other == label]
        n = sum(grads[i].size for i in pool)
        if n == 0:
            continue
        k = max(1, math.floor(deltas[pool[0]] * n + 0.5))
        tau = threshold([grads[i] for i in pool], k)
        taus.append(float(tau))
        for i in pool:
            g = grads[i]
            masks[i] = ((np.abs(g) >= tau) | np.isnan(g)) & (g != 0)
    return masks, taus


def step(
    theta,
    g_f,
    g_r,
    anchor,
    fisher,
    *,
    alpha=0.6,
    delta=0.5,
    gamma=100.0,
    penalty="partial",
    update="added",
    terms=TERMS,
    fisher_scale="unit",
    granularity="model",
):
    """G, (M_f, M_r) and (thresholds of g_f, thresholds of g_r). anchor or fisher None: p = 0."""
    each = lambda x: x if isinstance(x, list) else [x] * len(theta)  # noqa: E731
    pairs = [d if isinstance(d, tuple) else (d, d) for d in each(delta)]
    masks_f, taus_f = select(g_f, [d for d, _ in pairs], granularity)
    masks_r, taus_r = select(g_r, [d for _, d in pairs], granularity)
    if anchor is None or fisher is None:
        anchor, fisher = theta, [np.zeros(t.shape) for t in theta]
    mean = sum(F.sum() for F in fisher) / max(1, sum(F.size for F in fisher))
    scale = 1.0 if fisher_scale == "raw" else (1 / np.sqrt(mean) if mean > 0 else 0.0)

    combined = []
    for t, f, r, t0, F, m_f, m_r, a, c in zip(
        theta, g_f, g_r, anchor, fisher, masks_f, masks_r, each(alpha), each(gamma), strict=True
    ):
        overlap, remember_only = m_f & m_r, m_r & ~m_f
        p = c * scale * F * (t - t0)  # eqs. 8, 9
        if penalty != "full":
            p = np.where(remember_only, p, 0) if penalty == "partial" else np.zeros(t.shape)
        b = a * f + (1 - a) * r  # eq. 11, as in Algorithm 1 line 7
        m = np.where(overlap, b, np.where(m_f, f, 0))
        if update == "routed":
            G = np.where(m_f, m, np.where(remember_only, r, 0)) + p
        else:
            first = np.where(overlap, b, f) if update == "replaced" else f
            parts = {"forget": first, "remember": r + p, "modulated": m}
            G = sum(parts[name] for name in terms)  # eqs. 12, 13
        combined.append(G)
    return combined, (masks_f, masks_r), (taus_f, taus_r)
