"""A Frechet distance in a classifier's own features, for use without Inception weights.

It is not FID and is never called so. The features belong to another network, so its figures
compare only with figures of the same classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import evaluating, without_gradients


class Moments:
    """The mean and the covariance of features that come in batches, in float64.

    Only sums are kept, so the memory does not depend on the number of batches. The same batches in
    the same order give the same bits.
    """

    def __init__(self) -> None:
        self.n = 0
        self._sum, self._products = torch.zeros(()), torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Take (n, d) features, finite."""
        if not features.isfinite().all():
            raise ValueError("the features hold NaN or Inf; check the images and the weights")
        x = features.detach().cpu().double()
        self.n += len(x)
        self._sum, self._products = self._sum + x.sum(0), self._products + x.T @ x

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean (d,) and the unbiased covariance (d, d); there are at least 2 rows."""
        mean = self._sum / self.n
        return mean, (self._products - self.n * torch.outer(mean, mean)) / (self.n - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Return the distance of Gaussians fitted to two sets of features, in float64.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}(S_a + S_b - 2 (S_a S_b)^{1/2})

    with the unbiased covariances S. Singular covariances, as with fewer images than features, are
    no problem for the computation, but the estimate is biased upwards by about 1/n.

    Args:
        a, b: (n, d) and (m, d), n and m at least 2.

    Returns:
        The squared distance, >= 0, 0 for equal moments; in squared units of the features.
    """
    moments_a, moments_b = moments(a, "a"), moments(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"a has {a.shape[1]} features and b has {b.shape[1]}; take both from the same layer"
        )
    return distance_of(moments_a, moments_b)


def distance_of(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return :func:`frechet_distance` of two means (d,) and covariances (d, d), float64."""
    (mean_a, s_a), (mean_b, s_b) = a, b
    # (S_a S_b)^1/2 has the trace of (R S_b R)^1/2 with R = S_a^1/2. The latter is symmetric, so its
    # eigenvalues are real and, except for rounding, >= 0.
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + s_a.trace() + s_b.trace() - 2 * mixed
    return max(0.0, float(distance))


def moments(x: Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and the unbiased covariance (d, d) of (n, d) features, float64."""
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(
            f"{name} must have shape (n, d), n at least 2, one row per image; got {tuple(x.shape)}"
        )
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf; check the images and the classifier")
    x = x.detach().cpu().double()
    centred = x - x.mean(dim=0)
    return x.mean(dim=0), centred.T @ centred / (len(x) - 1)


@without_gradients()
def classifier_features(
    classifier: nn.Module,
    images: Tensor,
    *,
    layer: nn.Module | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Return the input of the last nn.Linear, or the output of `layer`: (n, d) float32.

    Dimensions after the first are flattened. The classifier runs in eval mode, on its own device
    and in its own dtype. Afterwards it is in its former mode again.
    """
    linears = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    if layer is None and not linears:
        raise ValueError(
            f"{type(classifier).__name__} has no nn.Linear to take features from; name the module "
            "whose output they are, layer=classifier.some_module"
        )
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: Any, output: Any) -> None:
        features = args[0] if layer is None else output
        # a copy, because an in-place ReLU may follow
        caught.append(features.detach().flatten(1).to("cpu", torch.float32, copy=True))

    weight = next(classifier.parameters(), images)
    handle = (linears[-1] if layer is None else layer).register_forward_hook(catch)
    try:
        with evaluating(classifier):
            for batch in images.split(batch_size):
                classifier(batch.to(weight.device, weight.dtype))
    finally:
        handle.remove()
    features = torch.cat(caught) if caught else torch.empty(0, 0)
    if len(features) != len(images):
        raise ValueError(
            f"layer was run for {len(features)} of {len(images)} images; give a module that "
            "the classifier calls once per pass"
        )
    return features


def classifier_frechet(
    classifier: nn.Module,
    images: Tensor,
    reference: Tensor,
    *,
    layer: nn.Module | None = None,
    batch_size: int = 256,
) -> float:
    """Return the Frechet distance between two sets of images in the features of a classifier.

    Args:
        images, reference: (n, C, H, W) and (m, C, H, W) in the classifier's own range.
        layer: the module whose output the features are; None uses the input of the last nn.Linear.

    Returns:
        The squared distance; lower is closer. Report it with the classifier and the layer.
    """
    options: dict[str, Any] = {"layer": layer, "batch_size": batch_size}
    return frechet_distance(
        classifier_features(classifier, images, **options),
        classifier_features(classifier, reference, **options),
    )
