"""SPM: rank-1 adapters that erase a concept, keep other embeddings, and are scaled per prompt."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..optim import PhasedOptimizer, WeightedSum
from ..optim.rule import Figures
from ._recipe import recipe


class Anchored(WeightedSum):
    """G = g_f + lambda g_r, where lambda is the number ``anchor_weight``."""

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        return 1.0, group["ebu_anchor_weight"], 0.0


class SPM(PhasedOptimizer):
    r"""SPM (Lyu et al., 2024): :math:`G = g_{\text{erase}} + \lambda\, g_{\text{anchor}}`.

    The erase loss is ``esd_loss`` with eta = 1 at a point sampled with the adapter. The remember
    loss is ``anchor_loss``. Only a LoRA of rank 1 and alpha 1 (up 0, down Kaiming-uniform) on every
    Linear and Conv2d of the transformer blocks is trained. The published run uses AdamW 1e-4, 3000
    steps, batch size 1, without clipping.

    Args:
        base: a torch optimizer over the adapter's weights.
        anchor_weight: lambda, >= 0.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        anchor_weight: float = 1000.0,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            base,
            Anchored(anchor_weight=anchor_weight),
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )


#: What SPM learns from.
RECIPE = recipe(
    "SPM",
    SPM,
    strength="anchor_weight",
    forgets="adapter",
    remembers="anchors",
    adapter=True,
    learning_rate=1e-4,
    clips=False,
)
