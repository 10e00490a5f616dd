"""A control: the class embedding alone is trained."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from ._recipe import recipe
from .joint import Joint


class EmbeddingOnly(Joint):
    """The plain sum over the class embedding alone: G = w_f g_f + g_r.

    It wins on entropy, accuracy and P_f, leaves every other class as it was, and forgets nothing in
    depth: a new embedding, learned against the frozen weights, brings the class back. A measure of
    forgetting on which it does well measures the label.

    Args:
        base: an optimizer over the embedding and nothing else, such as
            ``Adam(model.class_embedding.parameters(), lr=1e-2)``. Give the rest of the model
            ``requires_grad_(False)``, or its gradients are computed for nobody.
        embedding: the module (or parameters) that may be trained; None does not check.
        forget_weight, max_grad_norm, nonfinite: as of :class:`Joint`.

    Raises:
        ValueError: ``base`` holds another parameter.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        embedding: nn.Module | Iterable[Tensor] | None = None,
        forget_weight: float = 1.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base, forget_weight=forget_weight, max_grad_norm=max_grad_norm, nonfinite=nonfinite
        )
        if embedding is None:
            return
        held = embedding.parameters() if isinstance(embedding, nn.Module) else embedding
        allowed = {id(p) for p in held}
        for slot in self._slots():
            if id(slot.param) not in allowed:
                raise ValueError(
                    f"{slot.name} of shape {tuple(slot.param.shape)} is no part of the embedding: "
                    "build the base over the embedding alone, "
                    "Adam(model.class_embedding.parameters(), lr=1e-2)"
                )


#: What it learns from.
RECIPE = recipe("class embedding alone", EmbeddingOnly, strength="forget_weight", embedding=True)
