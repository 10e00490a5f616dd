"""Inversion: P_f after a new class embedding was learned with frozen weights.

It distinguishes a model that has forgotten from one whose condition was only unhooked. Training
only the class embedding reaches a P_f of 0, but inversion brings the whole class back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .depth import Loss, condition_replaced, learn_embeddings


def inversion(
    model: nn.Module,
    embedding: nn.Embedding,
    images: Tensor,
    scheduler: Any,
    p_f: Callable[[nn.Module], float],
    *,
    at: Sequence[int] = (100, 200),
    lr: float = 0.1,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
    null: int | None = None,
) -> dict[str, float]:
    """Return P_f with the learned embedding, at several numbers of steps in one run.

    Args:
        embedding: e.g. ``unet.class_embedding``.
        images: (n, C, H, W) real images of the forgotten class, from the training split, so that
            the classifier's test images stay unseen.
        p_f: returns P_f of a model: sample the forgotten class, with the same starting noise each
            time, and classify. Within the call, every condition but `null` is the learned one.
        loss: for a model that is not a diffusion model, ``loss(model, images, labels, generator)``
            -> 0-d tensor replaces the denoising loss; `scheduler` may then be None. The labels are
            zeros without a meaning: `embedding` returns the learned vector for any label.
        null: the label of the null condition, if `p_f` samples with guidance.

    Returns:
        ``{"inversion_100": ..., "inversion_200": ...}``, in [0, 1]; lower is deeper. The base
        model's own figure shows how far the attack can get.
    """
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "loss": loss}
    vectors = learn_embeddings(model, embedding, images, scheduler, at=at, **options)
    found = {}
    for steps in sorted(vectors):
        with condition_replaced(embedding, vectors[steps], null):
            found[f"inversion_{steps}"] = float(p_f(model))
    return found
