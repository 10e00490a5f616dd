"""Selective Amnesia: the plain sum with a Fisher penalty on every weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._compat import compat
from ..optim import PhasedOptimizer, TensorMap, WeightedSum
from ..optim.rule import Figures
from ._recipe import recipe


class FullAlignment(WeightedSum):
    """G = w_f g_f + w_r g_r + 2 lambda F (theta - theta0), where lambda is the number ``lam``."""

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        w_f, w_r, _ = super().weigh(group, figures)
        return w_f, w_r, 2 * group["ebu_lam"]


class SelectiveAmnesia(PhasedOptimizer):
    r"""SA (Heng & Soh, 2023): full Fisher alignment.

    The objective is :math:`w_f L_f + w_r L_r + \lambda \sum_i F_i (\theta_i - \theta_{0,i})^2`, as
    in its code, without a factor 1/2:

    .. math:: G = w_f g_f + w_r g_r + 2 \lambda F (\theta - \theta_0)

    The published forget loss is denoising on uniform noise images; the remember loss is denoising
    on replayed pairs. Both use the same timesteps: sample these once and pass them to both losses.
    EBU with ``penalty="full"`` has gamma = 2 lambda.

    The published lambda = 10 belongs to the raw F of a loss that is summed over C, H, W *and over
    all 1000 timesteps*. That F is 1000^2 times the F of the mean over timesteps, which
    :func:`~ebu_optim.diffusion.fisher_loss` estimates. With the latter, the same strength is 1e7.

    Args:
        base: a torch optimizer; the published run uses Adam 1e-4 with clipping at 1.0.
        fisher: the diagonal F at theta0, a mapping such as a :class:`~ebu_optim.DiagonalFisher`,
            or "online" for EBU's running estimate, which differs from the paper.
        lam: lambda, >= 0.
        forget_weight, remember_weight: w_f and w_r (gamma in the paper), 1 and 1 in the paper.
        fisher_scale: "raw" (as published) or "unit", which makes lambda independent of the loss's
            scale.
        anchor: theta0; None takes the weights at the first phase.
        max_grad_norm, nonfinite: as for :class:`~ebu_optim.EBUOptimizer`.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        fisher: str | TensorMap,
        lam: float = 10.0,
        forget_weight: float = 1.0,
        remember_weight: float = 1.0,
        fisher_scale: str = "raw",
        anchor: TensorMap | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if fisher is None:
            raise ValueError(
                "SelectiveAmnesia without a Fisher is the plain sum; give fisher=<a mapping>, or "
                "use Joint"
            )
        rule = FullAlignment(lam=lam, forget_weight=forget_weight, remember_weight=remember_weight)
        super().__init__(
            base,
            rule,
            fisher=fisher,
            fisher_scale=fisher_scale,
            anchor=anchor,
            max_grad_norm=max_grad_norm,
            nonfinite=nonfinite,
        )


#: What Selective Amnesia learns from.
RECIPE = recipe(
    "SA",
    SelectiveAmnesia,
    strength="lam",
    fisher="estimated",
    # the published lambda of 50 belongs to an F of the loss summed over 1000 timesteps
    published={"lam": 5e7},
)


def replayed_images(images: Tensor, *, compat: str | None = None) -> Tensor:
    """Return replayed images as the remember loss uses them, (n, C, H, W) in [-1, 1].

    None returns the images unchanged. "paper" returns what the released code reads back from its
    PNG files: 8 bits, where each image is stretched so that its least value is black and its
    largest white.
    """
    return _png(images) * 2 - 1 if _paper(compat) else images


def fisher_images(images: Tensor, *, compat: str | None = None) -> Tensor:
    """Return replayed images as F is estimated on them, (n, C, H, W).

    None returns the images unchanged, in [-1, 1], the range that the model was trained on. "paper"
    reads them from PNG files (see :func:`replayed_images`) and leaves them in [0, 1]: the released
    code does not shift them, so its F belongs to images that the model never saw.
    """
    return _png(images) if _paper(compat) else images


_paper = compat  # the functions' argument hides the name


def _png(images: Tensor) -> Tensor:
    """Stretch each image to [0, 1] and round it to 8 bits, as torchvision's save_image does."""
    low, high = images.flatten(1).aminmax(dim=1)
    shape = (-1, *[1] * (images.dim() - 1))
    unit = (images - low.view(shape)) / (high - low).clamp(min=1e-5).view(shape)
    return unit.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).to(images.dtype) / 255
