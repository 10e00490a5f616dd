"""Weights for torch-fidelity's Inception that a test makes: the real file's keys, random values.
Its features, and FID and KID of them by NumPy."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch_fidelity import FeatureExtractorInceptionV3 as Inception

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


def random_weights(path: Path) -> Path:
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(Inception, "load_state_dict"),
        mock.patch(f"{MODULE}.load_state_dict_from_url"),
    ):
        torch.manual_seed(0)
        model = Inception("inception-v3-compat", ["2048"])
        for m in model.modules():
            if isinstance(m, nn.Conv2d):  # torch's own start lets the features collapse
                nn.init.kaiming_normal_(m.weight)
    torch.save(model.state_dict(), path)
    return path


def features(x: torch.Tensor, weights: Path, layer: str) -> np.ndarray:
    """(n, d) float64 by the extractor alone, without torch-fidelity's metrics."""
    model = Inception("inception-v3-compat", [layer], feature_extractor_weights_path=str(weights))
    return torch.cat([model(b)[0] for b in x.split(16)]).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """With n images the covariance is x'x, x the n centred rows over sqrt(n - 1): the trace of the
    root of both covariances' product is the sum of the singular values of x y', a small matrix."""
    x, y = ((f - f.mean(0)) / np.sqrt(len(f) - 1) for f in (a, b))
    mixed = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(distance + (x**2).sum() + (y**2).sum() - 2 * mixed)


def mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al.: unbiased, kernel (x.y / d + 1)^3."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    aa, bb = kernel(a, a), kernel(b, b)
    return float(
        (aa.sum() - np.trace(aa)) / (n * (n - 1))
        + (bb.sum() - np.trace(bb)) / (m * (m - 1))
        - 2 * kernel(a, b).mean()
    )
