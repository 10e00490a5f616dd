"""A control that trains only the class embedding."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from ._recipe import recipe
from .joint import Joint


class EmbeddingOnly(Joint):
    """The plain sum over the class embedding only: G = w_f g_f + g_r.

    This control does well on entropy, accuracy and P_f and leaves every other class unchanged. But
    it forgets nothing in depth: a new embedding, learned with frozen weights, brings the class
    back. So a measure of forgetting on which it does well only measures the label.

    Args:
        base: an optimizer over only the embedding, such as
            ``Adam(model.class_embedding.parameters(), lr=1e-2)``. Call ``requires_grad_(False)``
            on the rest of the model, or its gradients are computed for nothing.
        embedding: the module (or parameters) that may be trained; None does not check.
        forget_weight, max_grad_norm, nonfinite: as for :class:`Joint`.

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
                    f"{slot.name} of shape {tuple(slot.param.shape)} is not a part of the "
                    "embedding; build the base over the embedding alone, "
                    "Adam(model.class_embedding.parameters(), lr=1e-2)"
                )


#: What the control learns from.
RECIPE = recipe("class embedding alone", EmbeddingOnly, strength="forget_weight", embedding=True)
