"""SGD, Adam and two quadratic losses in NumPy float64: what the baselines are compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

SHAPES = ((3, 4), (5,))


class Tiny(nn.Module):
    """Two float64 tensors, and losses whose gradients are known: weight (theta - target)."""

    def __init__(self) -> None:
        super().__init__()
        draw = np.random.default_rng(0)
        self.p = nn.ParameterList(
            nn.Parameter(torch.from_numpy(draw.standard_normal(s))) for s in SHAPES
        )

    def loss(self, i: int, name: str) -> torch.Tensor:
        return sum(
            (torch.from_numpy(w) * (p - torch.from_numpy(t)) ** 2).sum() / 2
            for p, (w, t) in zip(self.p, data(i, name), strict=True)
        )

    def arrays(self) -> list[np.ndarray]:
        return [p.detach().numpy().copy() for p in self.p]


def data(i: int, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and targets of the loss of step i; in odd steps the two losses pull apart."""
    sign = -3 if i % 2 and name == "forget" else 1
    draw = np.random.default_rng([i, name == "forget" and i % 2 == 0])
    return [(draw.uniform(0.1, 2.0, s), sign * draw.standard_normal(s)) for s in SHAPES]


def gradient(theta: list[np.ndarray], i: int, name: str) -> list[np.ndarray]:
    return [w * (p - t) for p, (w, t) in zip(theta, data(i, name), strict=True)]


class SGD:
    """Momentum 0.9, weight decay 0.01."""

    def __init__(self) -> None:
        self.v: list[np.ndarray] | None = None

    def step(self, theta: list[np.ndarray], G: list[np.ndarray]) -> list[np.ndarray]:
        G = [g + 0.01 * p for g, p in zip(G, theta, strict=True)]
        self.v = G if self.v is None else [0.9 * v + g for v, g in zip(self.v, G, strict=True)]
        return [p - 0.1 * v for p, v in zip(theta, self.v, strict=True)]


class Adam:
    """Step size 0.05, betas 0.9 and 0.999."""

    def __init__(self) -> None:
        self.t, self.m, self.v = 0, [0.0] * len(SHAPES), [0.0] * len(SHAPES)

    def step(self, theta: list[np.ndarray], G: list[np.ndarray]) -> list[np.ndarray]:
        self.t += 1
        self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m, G, strict=True)]
        self.v = [0.999 * v + 0.001 * g**2 for v, g in zip(self.v, G, strict=True)]
        a, b = 1 - 0.9**self.t, 1 - 0.999**self.t
        return [
            p - 0.05 * (m / a) / (np.sqrt(v / b) + 1e-8)
            for p, m, v in zip(theta, self.m, self.v, strict=True)
        ]


BASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01), SGD),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), Adam),
}


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in arrays])


def clipped(G: list[np.ndarray], largest: float) -> list[np.ndarray]:
    factor = min(1.0, largest / (np.linalg.norm(flat(G)) + 1e-6))
    return [g * factor for g in G]
