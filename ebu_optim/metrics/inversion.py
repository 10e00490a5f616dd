"""Inversion: P_f after a new class embedding has been learned against the frozen weights.

It tells a model that has forgotten from one whose condition was merely unhooked: training the
class embedding alone reaches a P_f of 0, and inversion brings the class back whole.
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
) -> dict[str, float]:
    """P_f with the learned embedding, at several numbers of steps from one run.

    Args:
        embedding: e.g. ``unet.class_embedding``.
        images: (n, C, H, W) real images of the forgotten class; of the training split, so that
            the classifier's test images stay unseen.
        p_f: the model -> its P_f: sample the forgotten class, with the same starting noise each
            time, and classify. Within the call every condition is the learned one, the null
            condition too: sample without guidance.
        loss: of a model that is no diffusion model, ``loss(model, images, labels, generator)`` ->
            0-d tensor, in the place of the denoising loss; `scheduler` may then be None. The
            labels are zeros, which say nothing: `embedding` gives the learned vector for any.

    Returns:
        ``{"inversion_100": ..., "inversion_200": ...}``, in [0, 1]; lower is deeper. The base
        model's own figure says how far the attack can get.
    """
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "loss": loss}
    vectors = learn_embeddings(model, embedding, images, scheduler, at=at, **options)
    found = {}
    for steps in sorted(vectors):
        with condition_replaced(embedding, vectors[steps]):
            found[f"inversion_{steps}"] = float(p_f(model))
    return found
