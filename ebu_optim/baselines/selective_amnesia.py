"""Selective Amnesia: the plain sum and a Fisher penalty on every weight."""

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
    """G = w_f g_f + w_r g_r + 2 lambda F (theta - theta0), lambda being the number ``lam``."""

    def weigh(self, group: dict[str, Any], figures: Figures) -> tuple[float, float, float]:
        w_f, w_r, _ = super().weigh(group, figures)
        return w_f, w_r, 2 * group["ebu_lam"]


class SelectiveAmnesia(PhasedOptimizer):
    r"""SA (Heng & Soh, 2023): full Fisher alignment.

    The objective is :math:`w_f L_f + w_r L_r + \lambda \sum_i F_i (\theta_i - \theta_{0,i})^2`, as
    its code has it, without a factor 1/2:

    .. math:: G = w_f g_f + w_r g_r + 2 \lambda F (\theta - \theta_0)

    Its forget loss is denoising on uniform noise images, its remember loss on replayed pairs, with
    the same timesteps for both (draw them once and pass them to both losses). EBU's ``penalty=
    "full"`` has gamma = 2 lambda.

    The published lambda = 10 belongs to the raw F of a loss that is summed over C, H, W *and over
    all 1000 timesteps*: that F is 1000^2 times the F of the mean over timesteps, which
    :func:`~ebu_optim.diffusion.fisher_loss` estimates. With such an F the same strength is 1e7.

    Args:
        base: a built torch optimizer; the published run has Adam 1e-4, clipping at 1.0.
        fisher: the diagonal F at theta0, a mapping (a :class:`~ebu_optim.DiagonalFisher` is one),
            or "online" for EBU's running estimate, which is not what the paper does.
        lam: lambda, >= 0.
        forget_weight, remember_weight: w_f and w_r (their gamma), 1 and 1 in the paper.
        fisher_scale: "raw" (theirs) or "unit", which makes lambda independent of the loss's scale.
        anchor: theta0; None takes the weights at the first phase.
        max_grad_norm, nonfinite: as of :class:`~ebu_optim.EBUOptimizer`.
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
                "SelectiveAmnesia without a Fisher is the plain sum: give fisher=<a mapping>, or "
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


#: What it learns from.
RECIPE = recipe(
    "SA",
    SelectiveAmnesia,
    strength="lam",
    fisher="estimated",
    # the published lambda of 50 belongs to an F of the loss summed over 1000 timesteps
    published={"lam": 5e7},
)


def replayed_images(images: Tensor, *, compat: str | None = None) -> Tensor:
    """Replayed images as the remember loss is to see them, (n, C, H, W) in [-1, 1].

    None returns them as they are. With "paper" they are what the released code reads back from its
    PNG files: stretched so that each image's least value is black and its largest white, 8 bits.
    """
    return _png(images) * 2 - 1 if _paper(compat) else images


def fisher_images(images: Tensor, *, compat: str | None = None) -> Tensor:
    """Replayed images as F is to be estimated on, (n, C, H, W).

    None returns them as they are, in [-1, 1], the range that the model was trained on. With "paper"
    they are read from PNG files (see :func:`replayed_images`) and left in [0, 1]: the released code
    forgets to move them, so the published F is that of images which the model never saw.
    """
    return _png(images) if _paper(compat) else images


_paper = compat  # the functions' argument hides the name


def _png(images: Tensor) -> Tensor:
    """Stretched image by image to [0, 1], rounded to 8 bits as torchvision's save_image does."""
    low, high = images.flatten(1).aminmax(dim=1)
    shape = (-1, *[1] * (images.dim() - 1))
    unit = (images - low.view(shape)) / (high - low).clamp(min=1e-5).view(shape)
    return unit.mul(255).add(0.5).clamp(0, 255).to(torch.uint8).to(images.dtype) / 255
