"""Jacobian descent: weights of the two gradients by any of TorchJD's weightings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._extras import require
from ._gramian import GramianOptimizer, Weighed
from ._recipe import Recipe


class Guarded:
    """A weighting of TorchJD, or one of the same form, applied to the Gramians of many parts.

    Args:
        weighting: maps a 2x2 Gramian, float64 on the CPU, to two weights.
        normalise: divide each Gramian by its trace first.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor], normalise: bool) -> None:
        self.weighting, self.normalise = weighting, normalise

    def __call__(self, gramians: Tensor) -> Tensor:
        return torch.stack(list(map(self._one, gramians.detach().cpu()))).to(gramians)

    def _one(self, gramian: Tensor) -> Tensor:
        trace = gramian.trace()
        if not trace > 0:  # both gradients are zero or not finite, so the weights do not matter
            return torch.ones(2, dtype=gramian.dtype)
        return self.weighting(gramian / trace if self.normalise else gramian).to(gramian)


class JacobianDescent(GramianOptimizer):
    r"""Two weights by a weighting of `TorchJD <https://torchjd.org>`_ (Quinton & Rey, 2024).

    The weighting sees only the Gramian of the two gradients:

    .. math:: G = w_1\, g_f + w_2\, g_r, \qquad w = \mathrm{weighting}\left(\begin{bmatrix}
              \langle g_f, g_f\rangle & \langle g_f, g_r\rangle \\
              \langle g_f, g_r\rangle & \langle g_r, g_r\rangle \end{bmatrix}\right)

    The sums of the weights differ (1 for MGDA and IMTL-G, 1 or more for UPGrad, 2 or more for
    PCGrad). So a learning rate does not transfer from one weighting to another, except with Adam.
    `stats` has the two weights.

    Args:
        base: a torch optimizer.
        weighting: the name of a TorchJD class without "Weighting" ("UPGrad", "MGDA", "IMTLG",
            "AlignedMTL", "FairGrad", "DualProj", ...), or an instance, or any callable that maps
            such a Gramian, float64 on the CPU, to two weights. By name, UPGrad and DualProj add
            nothing to the Gramian, and FairGrad has alpha = 1.
        forget_weight: w_f >= 0; the forget loss is scaled by it first.
        normalise: divide the Gramian by its trace, because TorchJD's tolerances are absolute.
            Weights that do not depend on the scale are unchanged. FairGrad's update is then
            :class:`MUNBa`'s times the norm of both gradients together.
        scope: "model", or each "tensor" or "module" separately, as for :class:`PCGrad`; a weighting
            takes 0.2 to 5 ms per part, on the CPU.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.

    Raises:
        ImportError: a name is given, but torchjd or a package that the class needs is missing.
        ValueError: torchjd has no weighting of that name.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        weighting: str | Callable[[Tensor], Tensor] = "UPGrad",
        forget_weight: float = 1.0,
        normalise: bool = True,
        scope: str = "model",
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        built = _named(weighting) if isinstance(weighting, str) else weighting
        rule = Weighed(Guarded(built, normalise), scope, forget_weight=forget_weight)
        name = weighting if isinstance(weighting, str) else type(weighting).__name__
        rule.options |= {"weighting": name}
        super().__init__(base, rule, max_grad_norm=max_grad_norm, nonfinite=nonfinite)


def _named(name: str) -> Any:
    """Return a TorchJD weighting by its name, with options that do not change the Gramian."""
    aggregation = require("torchjd.aggregation", "torchjd")
    kind = getattr(aggregation, f"{name}Weighting", None)
    if kind is None:
        known = sorted(
            n.removesuffix("Weighting")
            for n in dir(aggregation)
            if n.endswith("Weighting") and n != "Weighting"
        )
        raise ValueError(f"weighting={name!r} is not in torchjd; use {', '.join(known)}")
    if name in ("UPGrad", "DualProj"):
        require("quadprog", "torchjd")
        require("qpsolvers", "torchjd")
        # the usual 1e-4 is added to the Gramian and disables the projection of a small one
        projector = require("torchjd.linalg", "torchjd").QuadprogProjector
        return kind(projector=projector(norm_eps=0.0, reg_eps=1e-13))
    try:
        return kind(alpha=1.0) if name == "FairGrad" else kind()
    except TypeError as error:
        raise ValueError(
            f"weighting={name!r} has options without a default ({error}); pass an instance instead"
        ) from error


#: What each method learns from: method, title and TorchJD's name.
RECIPES = {
    method: Recipe(
        title, partial(JacobianDescent, weighting=name), "forget_weight", stalls=method == "mgda"
    )
    for method, title, name in (
        ("upgrad", "UPGrad", "UPGrad"),
        ("mgda", "MGDA", "MGDA"),
        ("imtl_g", "IMTL-G", "IMTLG"),
        ("aligned_mtl", "Aligned-MTL", "AlignedMTL"),
        ("fairgrad", "FairGrad", "FairGrad"),
    )
}
