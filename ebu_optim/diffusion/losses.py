r"""Forget and remember losses of a diffusion model (docs/method.md, "Losses").

Notation: images x of shape (n, C, H, W), timesteps t of shape (n,), the scheduler's
:math:`\bar\alpha_t`, and
:math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon`.
A condition is a tensor of class labels (n,), passed on as ``class_labels``, or a mapping of keyword
arguments of the model. With a FlowMatchEulerDiscreteScheduler, x_t and the target are those of flow
matching, and timesteps are floats (:mod:`~ebu_optim.diffusion.flow`). A model is a diffusers
UNet2DModel or any callable with its signature; it predicts a tensor of the shape of x_t. If the
scheduler's ``variance_type`` is "learned" or "learned_range", the model may predict twice as many
channels; the losses ignore the second half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import evaluating, without_gradients
from .conditions import Condition
from .pretrained import Pretrained
from .schedules import check_family, drawn, noised, of_gaussian, predicts_variance, weights

Model = Callable[..., Any]


def randn(shape: Any, generator: torch.Generator | None, like: Tensor) -> Tensor:
    source = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=source, dtype=like.dtype).to(like.device)


def as_taken(model: Any, x_t: Any) -> Any:
    """Return x_t in the dtype of a model that has one (as diffusers' models do), outside autocast.

    Anything but a floating-point tensor is returned unchanged.
    """
    dtype = getattr(model, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not isinstance(x_t, Tensor):
        return x_t
    if not x_t.is_floating_point() or torch.is_autocast_enabled(x_t.device.type):
        return x_t
    return x_t.to(dtype)


def output(
    model: Model, x_t: Tensor, t: Tensor, condition: Condition, scheduler: Any = None
) -> Tensor:
    """Return all that the model predicts for a condition.

    This is a tensor of the shape of `x_t`, or with twice as many channels if the scheduler's
    variance is learned.

    Raises:
        ValueError: the prediction has another shape.
    """
    kwargs = condition if isinstance(condition, Mapping) else {"class_labels": condition}
    out = model(as_taken(model, x_t), t, **kwargs)
    out = out if isinstance(out, Tensor) else out.sample if hasattr(out, "sample") else out[0]
    if out.shape == x_t.shape:
        return out
    n, channels, *rest = x_t.shape
    if predicts_variance(scheduler) and out.shape == (n, 2 * channels, *rest):
        return out
    raise ValueError(
        f"the model predicts shape {tuple(out.shape)} for x_t of shape {tuple(x_t.shape)}; it must "
        "predict the same shape. Twice the channels, with a variance in the second half, need a "
        'scheduler whose variance_type is "learned" or "learned_range"'
    )


def predict(
    model: Model, x_t: Tensor, t: Tensor, condition: Condition, scheduler: Any = None
) -> Tensor:
    """Return the model's epsilon, v or velocity, of the shape of `x_t`, without a variance."""
    out = output(model, x_t, t, condition, scheduler)
    return out if out.shape == x_t.shape else out[:, : x_t.shape[1]]


def each_loss(error: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Return the weighted squared error of each sample (n,), its "sum" or "mean" over C, H, W."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean" over C, H, W; got {reduction!r}')
    square = error.float().square().flatten(1)
    found = square.sum(1) if reduction == "sum" else square.mean(1)
    return found if weight is None else found * weight


def reduce_loss(error: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    """Return the mean of `each_loss` over the batch."""
    return each_loss(error, reduction, weight).mean()


def denoising_loss(
    model: Model,
    x: Tensor,
    condition: Condition,
    scheduler: Any,
    *,
    reduction: str = "sum",
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""L(x, c): the mean of :math:`\|\epsilon - \epsilon_\theta(x_t, t, c)\|^2` (or of v).

    With replayed pairs this is the remember loss. With images of the mandatory distribution q and
    the condition to forget it is the forget loss (eqs. 6 and 7; denoising on x ~ q minimises
    KL(q || p), the reverse of eq. 6 as printed).

    Args:
        model: called as ``model(x_t, t, class_labels=condition)``.
        x: (n, C, H, W) images, in the range that the model was trained on.
        condition: labels (n,) or keyword arguments of the model.
        scheduler: a diffusers scheduler with ``alphas_cumprod`` and a ``prediction_type`` of
            epsilon or v_prediction, or a FlowMatchEulerDiscreteScheduler. Its own ``add_noise`` is
            not used. x_t is computed in float32 and passed in the dtype of x.
        reduction: "sum" over C, H, W (the DDPM code base) or "mean" (diffusers); mean over n.
        timesteps, noise: values to use instead of antithetic draws (for flow matching: see
            :mod:`~ebu_optim.diffusion.flow`) and Gaussian noise.
        generator: the generator of the draws; None uses torch's global stream.

    Returns:
        0-d float32 loss.

    Raises:
        ValueError: the scheduler has another family (EDM) or prediction type; the prediction has
            another shape than x_t.
    """
    timesteps = drawn(scheduler, len(x), timesteps, generator, x.device)
    if noise is None:
        noise = randn(x.shape, generator, x)
    x_t, target = noised(scheduler, x, noise, timesteps)
    error = predict(model, x_t, timesteps, condition, scheduler) - target
    return reduce_loss(error, reduction, weights(scheduler, timesteps))


def surrogate_noise(
    kind: str,
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return images of a mandatory distribution q, float32 of `shape` (n, C, H, W).

    "uniform": independent pixels, uniform in [-1, 1] (Selective Amnesia's code); "gaussian":
    standard Gaussian pixels (the paper's text). :func:`sample_set` makes images of a surrogate
    prompt or class.
    """
    source = generator.device if generator is not None else device
    if kind == "uniform":
        return torch.rand(shape, generator=generator, device=source).mul_(2).sub_(1).to(device)
    if kind == "gaussian":
        return torch.randn(shape, generator=generator, device=source).to(device)
    raise ValueError(f'surrogate must be "uniform" or "gaussian"; got {kind!r}')


def gaussian_forget_loss(
    model: Model,
    shape: tuple[int, ...],
    condition: Condition,
    scheduler: Any,
    *,
    reduction: str = "sum",
    timesteps: Tensor | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Return the forget loss for q = N(0, I) with its target in closed form.

    Then :math:`x_t \sim N(0, I)` and :math:`E[\epsilon | x_t] = \sqrt{1 - \bar\alpha_t}\, x_t`
    (and :math:`E[v | x_t] = 0`). The gradient is that of :func:`denoising_loss` on Gaussian images
    but without the noise of a sampled :math:`\epsilon`. For flow matching see
    :func:`~ebu_optim.diffusion.flow.of_gaussian`.

    Args:
        shape: (n, C, H, W) of the batch.

    Returns:
        0-d float32 loss.
    """
    check_family(scheduler)
    noise = surrogate_noise("gaussian", shape, generator=generator, device=device)
    timesteps = drawn(scheduler, shape[0], timesteps, generator, device)
    x_t, target = of_gaussian(scheduler, noise, timesteps)
    error = predict(model, x_t, timesteps, condition, scheduler) - target
    return reduce_loss(error, reduction, weights(scheduler, timesteps))


def distillation_loss(
    model: Model,
    teacher: Model,
    x: Tensor,
    condition: Condition,
    scheduler: Any,
    *,
    crossed: Tensor | None = None,
    reduction: str = "sum",
    timesteps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the remember loss closer to eq. 7: match the frozen model's prediction on noised x.

    Args:
        teacher: the frozen model; :func:`anchored` makes one from the optimizer's theta0.
        x, condition: replayed pairs, as for :func:`denoising_loss`.
        crossed: 1-d labels of all kept classes. If given, each sample's condition is sampled from
            them, whatever its image shows ("crossed"), and `condition` is not used. So the model is
            also held where there is nothing to replay.

    Returns:
        0-d float32 loss.
    """
    n = len(x)
    timesteps = drawn(scheduler, n, timesteps, generator, x.device)
    if crossed is not None:
        source = generator.device if generator is not None else x.device
        pick = torch.randint(len(crossed), (n,), generator=generator, device=source)
        condition = crossed.to(x.device)[pick.to(x.device)]
    x_t, _ = noised(scheduler, x, randn(x.shape, generator, x), timesteps)
    with without_gradients():
        target = predict(teacher, x_t, timesteps, condition, scheduler)
    error = predict(model, x_t, timesteps, condition, scheduler) - target
    return reduce_loss(error, reduction, weights(scheduler, timesteps))


def anchored(
    model: nn.Module, optimizer: Any, *, masters: Mapping[Tensor, Tensor] | None = None
) -> Model:
    """Return the pretrained model in eval mode as a callable, from the optimizer's theta0.

    No second copy of the weights is made: frozen parameters are the model's own. Floating buffers,
    such as BatchNorm's statistics, are copied in this call, so make the teacher before the first
    phase and before a checkpoint is loaded. theta0 exists from the first phase on if a penalty uses
    it, or if ``anchor=`` gave it. However theta0 is held, the teacher computes in the model's dtype
    and on its device.

    Args:
        masters: maps the model's parameters to the optimizer's, if the optimizer holds float32
            copies: ``dict(zip(model.parameters(), masters))``.

    Raises:
        RuntimeError: when the teacher is called and a parameter that requires a gradient has no
            theta0: the teacher would be the trained model.
        TypeError, ValueError: `masters` is not a mapping, or a master has another shape.
    """
    pretrained = Pretrained(model, optimizer, masters)

    def teacher(*args: Any, **kwargs: Any) -> Any:
        tensors = pretrained.tensors()
        args = tuple(as_taken(model, x_t) for x_t in args[:1]) + args[1:]
        with evaluating(model):
            return torch.func.functional_call(model, tensors, args, kwargs)

    return teacher


@contextmanager
def noisy_condition(
    embedding: nn.Module,
    scale: float,
    *,
    only: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Add noise to the output of a condition's embedding inside the block.

    Each sample gets Gaussian noise whose standard deviation is uniform in [0, scale * s], where s
    is the standard deviation of the embedding's weights. With it, the forget loss also forgets the
    neighbourhood of the forgotten condition.

    Args:
        embedding: e.g. ``unet.class_embedding``; its output has shape (n, ...).
        scale: >= 0; 1 goes up to the spread of the embedding itself.
        only: 1-d labels that get noise; None is all. Use it for losses that also run other
            conditions, such as :func:`~ebu_optim.baselines.relabel_loss`.
    """
    if not scale >= 0:
        raise ValueError(f"scale must be >= 0; got {scale}")
    weight = next(embedding.parameters(), None)
    if weight is None:
        raise ValueError(
            f"embedding has no parameters, so its spread is unknown; got {embedding!r}"
        )
    spread = float(weight.detach().std())

    def add(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        source = generator.device if generator is not None else output.device
        width = torch.rand(len(output), generator=generator, device=source).to(output)
        if only is not None:
            width = width * torch.isin(args[0], only.to(args[0].device))
        width = (width * scale * spread).view(-1, *[1] * (output.dim() - 1))
        return output + width * randn(output.shape, generator, output)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
