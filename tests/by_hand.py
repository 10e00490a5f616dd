"""DDPM's noise schedule in NumPy float64, and small helpers beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

KINDS = ("epsilon", "v_prediction")
#: bar alpha of DDPM's linear betas
BAR = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sqrt(bar alpha) and sqrt(1 - bar alpha), between two timesteps too."""
    sigma = np.interp(t, np.arange(1000), np.sqrt((1 - BAR) / BAR))
    return 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)


def column(values, like: Tensor) -> Tensor:
    return torch.as_tensor(values).to(like).view(-1, *[1] * (like.dim() - 1))


class Constant:
    """Predicts its label + `value` in C channels and 9 in the others."""

    def __init__(self, value: float, times: int) -> None:
        self.value, self.times = value, times

    def __call__(self, x, t, class_labels=None, encoder_hidden_states=None):
        label = class_labels if encoder_hidden_states is None else encoder_hidden_states
        eps = torch.zeros_like(x) + column(label + self.value, x)
        return torch.cat([eps] + [torch.full_like(x, 9.0)] * (self.times - 1), 1)
