"""CE, RA, UA and P_f: a classifier's results on generated images.

The paper's CE is the entropy of the classifier's prediction, not a cross-entropy. It is high on the
forgotten class (the classifier does not recognize the images) and low on the kept classes.
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
    """Return logits (n, K), float32 on the CPU, of images (n, C, H, W) in the classifier's range.

    A module runs in eval mode on its own device. Afterwards it is in its former mode again.
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
            f"logits must have shape (n, K) with n > 0; got {tuple(logits.shape)}; "
            "give the classifier's output, before softmax, of at least one image"
        )
    if logits.isnan().any() or (logits == torch.inf).any():
        raise ValueError(
            "logits hold NaN or +Inf, which give no probability; check the images "
            "(a diverged model samples NaN) and the classifier's dtype"
        )
    return logits.float()


def entropies(logits: Tensor) -> Tensor:
    """Return -sum_k p_k ln p_k of each image, (n,) float64 in nats; :func:`entropy` is the mean."""
    log_p = _logits(logits).double().log_softmax(dim=1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(dim=1)


def entropy(logits: Tensor) -> float:
    """Return CE: the mean over images of -sum_k p_k ln p_k, in nats, in [0, ln K].

    It is computed from log_softmax. A class whose probability underflows adds 0, not NaN.

    Args:
        logits: (n, K).
    """
    return float(entropies(logits).mean())


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which images have their label as top class, (n,) bool; see :func:`accuracy`."""
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
    """Return the share of images whose top class is their label, in [0, 1].

    On the kept classes this is RA; on the forgotten class, UA = 1 - accuracy.

    Args:
        logits: (n, K).
        labels: (n,) the classes that the generator was asked for.
    """
    return float(hits(logits, labels).float().mean())


def probability(logits: Tensor, target: int) -> float:
    """Return P_f: the mean probability that the classifier gives to class `target`, in [0, 1].

    Args:
        logits: (n, K); K includes a reject class if the classifier has one.
        target: the forgotten class.
    """
    logits = _logits(logits)
    if not 0 <= target < logits.shape[1]:
        raise ValueError(f"target must be in 0..{logits.shape[1] - 1}; got {target}")
    return float(logits.double().softmax(dim=1)[:, target].mean())
