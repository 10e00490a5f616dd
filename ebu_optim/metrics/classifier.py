"""CE, RA, UA and P_f: what a classifier says of generated images.

The paper's CE is the entropy of the classifier's prediction, no cross-entropy: high on the
forgotten class (the classifier does not know what it sees), low on the kept ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modules import evaluating, without_gradients


@without_gradients()
def classify(
    classifier: Callable[[Tensor], Tensor], images: Tensor, *, batch_size: int = 256
) -> Tensor:
    """Logits (n, K), float32 on the CPU, of images (n, C, H, W) in the classifier's own range.

    A module is evaluated in eval mode and on its own device, and left in the mode it was in.
    """
    device, dtype = images.device, images.dtype
    if isinstance(classifier, nn.Module):
        weight = next(classifier.parameters(), images)
        device, dtype = weight.device, weight.dtype
    with evaluating(classifier):
        batches = [classifier(b.to(device, dtype)).float().cpu() for b in images.split(batch_size)]
    return torch.cat(batches)


def _logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or not len(logits):
        raise ValueError(
            f"logits must have shape (n, K) with n > 0; got {tuple(logits.shape)}: "
            "give the classifier's output, before softmax, of at least one image"
        )
    if logits.isnan().any() or (logits == torch.inf).any():
        raise ValueError(
            "logits hold NaN or +Inf, of which no probability can be told: look at the images "
            "(a diverged model draws NaN) and at the classifier's dtype"
        )
    return logits.float()


def entropies(logits: Tensor) -> Tensor:
    """-sum_k p_k ln p_k of each image, (n,) float64 in nats; :func:`entropy` is their mean."""
    log_p = _logits(logits).double().log_softmax(dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


def entropy(logits: Tensor) -> float:
    """CE: the mean over images of -sum_k p_k ln p_k, in nats; 0 to ln K.

    Computed from log_softmax; a class whose probability underflows adds 0, not NaN.

    Args:
        logits: (n, K).
    """
    return float(entropies(logits).mean())


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images have their label as top class, (n,) bool; :func:`accuracy` is their share."""
    logits = _logits(logits)
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(logits)},), one per image; got {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be in 0..{logits.shape[1] - 1}, the classifier's classes; got "
            f"{int(labels.min())}..{int(labels.max())}"
        )
    return logits.argmax(dim=1) == labels.to(logits.device)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose top class is their label, in [0, 1].

    On the kept classes this is RA; on the forgotten class, UA = 1 - accuracy.

    Args:
        logits: (n, K).
        labels: (n,) the classes that the generator was asked for.
    """
    return float(hits(logits, labels).float().mean())


def probability(logits: Tensor, target: int) -> float:
    """P_f: the mean probability that the classifier gives to class `target`, in [0, 1].

    Args:
        logits: (n, K); with a classifier that has a reject class, K counts it.
        target: the forgotten class.
    """
    logits = _logits(logits)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target must be in 0..{logits.shape[1] - 1}; got {target}")
    return float(logits.double().softmax(dim=1)[:, target].mean())
