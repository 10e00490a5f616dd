"""Next-class labels as a forget loss, for SalUn and EraseDiff."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .._compat import compat as _paper
from ..modules import evaluating, without_gradients
from .losses import Model, predict, randn, reduce_loss
from .schedules import drawn, noised, weights


def next_class(
    labels: Tensor, num_classes: int, *, forgotten: Collection[int], compat: str | None = None
) -> Tensor:
    """Return, for each label, the next class in cyclic order that is not forgotten; (n,) int64.

    With "paper" it is (c + 1) mod num_classes, forgotten or not: SalUn's "random label".

    Raises:
        TypeError: the labels are not whole numbers.
        ValueError: all classes are forgotten.
    """
    if labels.is_floating_point():
        raise TypeError(f"labels must be whole numbers; got {labels.dtype}")
    labels = labels.long()  # torch would use uint8 labels as a mask
    if _paper(compat):
        return (labels + 1) % num_classes
    kept = [c for c in range(num_classes) if c not in set(forgotten)]
    if not kept:
        raise ValueError(
            f"forgotten holds all {num_classes} classes; leave at least one class to relabel to"
        )
    table = [next((k for k in kept if k > c), kept[0]) for c in range(num_classes)]
    return torch.tensor(table, device=labels.device)[labels]


def relabel_loss(
    model: Model,
    x: Tensor,
    labels: Tensor,
    relabelled: Tensor,
    scheduler: Any,
    *,
    teacher: Model | None = None,
    compat: str | None = None,
    null_class: int | None = None,
    reduction: str = "mean",
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Make the class to forget predict what another class predicts:
    :math:`\|\epsilon_\theta(x_t, t, c_f) - \mathrm{sg}[\epsilon_{\theta'}(x_t, t, c')]\|^2`.

    Args:
        model: called as ``model(x_t, t, class_labels=...)``.
        x: (n, C, H, W) images of the classes to forget.
        labels, relabelled: (n,) their classes c_f and the others c' (:func:`next_class`).
        scheduler: as for :func:`~ebu_optim.diffusion.denoising_loss`.
        teacher: theta', a frozen model; None is the present model, as in SalUn's code. Either one
            predicts in eval mode.
        compat: "paper" uses the present model in its present mode (each pass has its own dropout
            mask). Both passes replace each condition by ``null_class`` with probability 0.1,
            independently, so about one in five pairs compares other conditions.
        null_class: the label of the unconditional model; only "paper" needs it.
        reduction: over C, H, W: "mean" (SalUn) or "sum".
        timesteps, noise, generator: as for :func:`~ebu_optim.diffusion.denoising_loss`.

    Returns:
        0-d float32 loss.
    Raises:
        ValueError: "paper" without `null_class` or with a teacher.
    """
    paper = _paper(compat)
    if paper and (null_class is None or teacher is not None):
        raise ValueError('relabel_loss: compat="paper" needs null_class and takes no teacher')
    timesteps = drawn(scheduler, len(x), timesteps, generator, x.device)
    if noise is None:
        noise = randn(x.shape, generator, x)
    x_t, _ = noised(scheduler, x, noise, timesteps)
    if paper:
        labels, relabelled = (
            _dropped(c, int(null_class or 0), generator) for c in (labels, relabelled)
        )
        with without_gradients():
            target = predict(model, x_t, timesteps, relabelled, scheduler)
    else:
        source = model if teacher is None else teacher
        with without_gradients(), evaluating(source):
            target = predict(source, x_t, timesteps, relabelled, scheduler)
    error = predict(model, x_t, timesteps, labels, scheduler) - target
    return reduce_loss(error, reduction, weights(scheduler, timesteps))


def _dropped(labels: Tensor, null_class: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else labels.device
    drop = torch.rand(labels.shape, generator=generator, device=device).to(labels.device) < 0.1
    return torch.where(drop, null_class, labels)
