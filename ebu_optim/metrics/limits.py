"""All figures of the classifiers, with intervals and with the scores of noise and the base model.

A classifier without a reject class must assign noise to *some* class. So forgetting into noise has
limits: a floor of P_f that depends on the class, and a ceiling of CE_f far below ln K. A figure
means little without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.losses import surrogate_noise
from .classifier import classify, entropies, hits
from .intervals import estimate

Classifier = Callable[[Tensor], Tensor]


def _split(images: Tensor, labels: Tensor, forget: Sequence[int]) -> Tensor:
    """Return which images were asked for a class to forget, (n,) bool, after all checks."""
    if not len(forget):
        raise ValueError("forget must name at least one class; got none")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(images)},), one per image; got {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers, the classes; got {labels.dtype}")
    absent = sorted(set(forget) - set(labels.tolist()))
    if absent:
        raise ValueError(
            f"forget names {absent}, of which there is no image; sample images of the forgotten "
            f"classes too; the labels are {sorted(set(labels.tolist()))}"
        )
    f = torch.isin(labels.cpu(), torch.tensor(list(forget)))
    if f.all():
        raise ValueError(
            f"labels hold only the forgotten classes {sorted(set(forget))}; RA and CE_r need "
            "images of kept classes"
        )
    return f


def _logits(classifier: Classifier, images: Tensor, classes: int | None, name: str) -> Tensor:
    logits = classify(classifier, images)
    if classes is not None and (logits.dim() != 2 or logits.shape[1] != classes):
        raise ValueError(
            f"{name} gives logits of shape {tuple(logits.shape)} for {len(images)} images; "
            f"{classes} classes were expected; give a classifier trained on these classes"
        )
    return logits


def _scores(logits: Tensor, labels: Tensor, f: Tensor, entropy: bool) -> dict[str, Tensor]:
    """Return the values whose means are the metrics, one per image."""
    labels = labels.cpu().long()
    top = hits(logits, labels)
    asked = logits.double().softmax(dim=1).gather(1, labels[:, None])[:, 0]
    found = {
        "p_f": asked[f],
        "ua": ~top[f],
        "ra": top[~f],
    }
    if entropy:
        found |= {"ce_f": entropies(logits[f]), "ce_r": entropies(logits[~f])}
    return found


def _noise_scores(logits: Tensor, labels: Tensor, f: Tensor, entropy: bool) -> dict[str, float]:
    """Return the scores of noise, weighting each class as in `labels`: noise has no label."""

    def mean(per_class: Tensor, asked: Tensor) -> float:
        weight = torch.bincount(asked.cpu(), minlength=logits.shape[1]).double()
        return float((per_class * weight).sum() / weight.sum())

    p = logits.double().softmax(dim=1).mean(dim=0)
    top = torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]).double() / len(logits)
    found = {
        "p_f": mean(p, labels[f]),
        "ua": 1 - mean(top, labels[f]),
        "ra": mean(top, labels[~f]),
    }
    if entropy:
        found["ce_f"] = found["ce_r"] = float(entropies(logits).mean())
    return found


def classifier_metrics(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    forget: Sequence[int],
    *,
    reject: Classifier | None = None,
    base_images: Tensor | None = None,
    base_labels: Tensor | None = None,
    surrogate: str = "uniform",
    noise_images: int = 2000,
    num_classes: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """CE_f, CE_r, RA, UA and P_f, each with an interval and with its limits.

    The intervals are Wilson's for the shares (RA, UA) and a bootstrap's for the means (CE, P_f).

    Args:
        classifier: maps images, in the range of `images`, to logits (n, K).
        images: (n, C, H, W) of the model under test, in [-1, 1]; forgotten and kept classes.
        labels: (n,) the class that each image was asked for.
        forget: the forgotten classes. P_f is the probability of the class that was asked for, so
            with several forgotten classes it is the mean over their images.
        reject: a second classifier whose last class means "none of them". It adds ``p_f_reject``,
            ``ua_reject`` and ``ra_reject``, which noise does not limit.
        base_images: images of the model before unlearning; None leaves ``base`` out.
        base_labels: their classes; None uses `labels`.
        surrogate: the kind of noise, "uniform" or "gaussian": the one that was forgotten into. It
            is clipped to [-1, 1], like samples.
        num_classes: K; if given, a classifier with other classes raises ValueError.

    Returns:
        name -> ``value``, ``low`` and ``high`` (the interval), ``n`` images, ``noise`` and
        ``base``, the scores of noise and of the base model. ``ce_*`` in nats, the rest in [0, 1].

    Raises:
        ValueError: labels and images do not fit; a forgotten class has no image; there is no kept
            class; a classifier has other classes.
    """
    f = _split(images, labels, forget)
    noise = surrogate_noise(
        surrogate, (noise_images, *images.shape[1:]), generator=torch.Generator().manual_seed(seed)
    ).clamp_(-1, 1)
    if base_images is not None:
        base_labels = labels if base_labels is None else base_labels
        base_f = _split(base_images, base_labels, forget)

    found: dict[str, dict[str, Any]] = {}
    rejects = None if num_classes is None else num_classes + 1
    for ending, judge, classes, name in (
        ("", classifier, num_classes, "classifier"),
        ("_reject", reject, rejects, "reject"),
    ):
        if judge is None:
            continue
        plain = not ending
        values = _scores(_logits(judge, images, classes, name), labels, f, plain)
        limits = {"noise": _noise_scores(classify(judge, noise), labels, f, plain)}
        if base_images is not None and base_labels is not None:
            base = _scores(classify(judge, base_images), base_labels, base_f, plain)
            limits["base"] = {k: float(v.double().mean()) for k, v in base.items()}
        for key, value in values.items():
            found[key + ending] = {
                **estimate(value, confidence=confidence, seed=seed),
                **{limit: scores[key] for limit, scores in limits.items()},
            }
    return found
