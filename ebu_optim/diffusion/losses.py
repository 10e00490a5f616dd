r"""Forget and remember losses of a diffusion model (docs/method.md, "Losses").

Notation: images x of shape (n, C, H, W), timesteps t of shape (n,), the scheduler's
:math:`\bar\alpha_t`, and
:math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon`.
A condition is a tensor of class labels (n,), passed on as ``class_labels``, or a mapping of keyword
arguments of the model. A model is a diffusers UNet2DModel or any callable with its signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import evaluating, without_gradients

Condition = Tensor | Mapping[str, Any]
Model = Callable[..., Any]


def antithetic_timesteps(
    n: int,
    num_timesteps: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """n timesteps in 0..T-1: n // 2 + 1 uniform draws, then their mirror images T-1-t, cut to n.

    Returns:
        (n,) int64 on `device`. The draw is made on the generator's device (CPU without one).
    """
    source = generator.device if generator is not None else "cpu"
    t = torch.randint(num_timesteps, (n // 2 + 1,), generator=generator, device=source)
    return torch.cat([t, num_timesteps - 1 - t])[:n].to(device)


def randn(shape: Any, generator: torch.Generator | None, like: Tensor) -> Tensor:
    source = generator.device if generator is not None else like.device
    return torch.randn(shape, generator=generator, device=source, dtype=like.dtype).to(like.device)


def predict(model: Model, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The model's output for a condition, as a tensor of the shape of `x_t`; a model that has a
    ``dtype`` (diffusers' have) is given x_t in it."""
    kwargs = condition if isinstance(condition, Mapping) else {"class_labels": condition}
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and not torch.is_autocast_enabled(x_t.device.type):
        x_t = x_t.to(dtype)
    out = model(x_t, t, **kwargs)
    return out if isinstance(out, Tensor) else out.sample if hasattr(out, "sample") else out[0]


def reduce_loss(error: Tensor, reduction: str) -> Tensor:
    """Squared error: mean over the batch of the "sum" or the "mean" over C, H, W."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean" over C, H, W; got {reduction!r}')
    square = error.float().square().flatten(1)
    return (square.sum(1) if reduction == "sum" else square.mean(1)).mean()


def noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the model's target there, epsilon or v, by the formulas of this file.

    Not by ``scheduler.add_noise``: schedulers such as EulerDiscrete scale x_t in another way for
    their own sampling, while the model and its target are the same.
    """
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the scheduler's prediction_type is {kind!r}; these losses know epsilon and "
            "v_prediction"
        )
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod; these losses need a scheduler with "
            "a variance-preserving noise schedule, such as DDPMScheduler"
        )
    alpha_bar = scheduler.alphas_cumprod.to(x.device, x.dtype)[t].view(-1, *[1] * (x.dim() - 1))
    signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_t = signal * x + spread * noise
    return x_t, noise if kind == "epsilon" else signal * noise - spread * x


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

    With replayed pairs this is the remember loss, with images of the mandatory distribution q and
    the condition to forget it is the forget loss (eqs. 6 and 7; denoising on x ~ q minimises
    KL(q || p), the reverse of eq. 6 as printed).

    Args:
        model: called as ``model(x_t, t, class_labels=condition)``.
        x: (n, C, H, W) images, in the range that the model was trained on.
        condition: labels (n,) or keyword arguments of the model.
        scheduler: a diffusers scheduler with ``alphas_cumprod`` and a ``prediction_type`` of
            epsilon or v_prediction; its own ``add_noise`` is not used.
        reduction: "sum" over C, H, W (the DDPM code base) or "mean" (diffusers); mean over n.
        timesteps, noise: given values instead of antithetic draws and Gaussian noise.
        generator: of the draws; None uses torch's global stream.

    Returns:
        0-d float32 loss.
    """
    if timesteps is None:
        timesteps = antithetic_timesteps(
            len(x), scheduler.config.num_train_timesteps, generator=generator, device=x.device
        )
    if noise is None:
        noise = randn(x.shape, generator, x)
    x_t, target = noised(scheduler, x, noise, timesteps)
    error = predict(model, x_t, timesteps, condition) - target
    return reduce_loss(error, reduction)


def surrogate_noise(
    kind: str,
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Images of a mandatory distribution q, float32 of `shape` (n, C, H, W).

    "uniform": independent pixels, uniform in [-1, 1] (Selective Amnesia's code); "gaussian":
    standard Gaussian pixels (the paper's text). Images of a surrogate prompt or class come from
    :func:`sample_set`.
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
    r"""The forget loss for q = N(0, I) with its target in closed form.

    Then :math:`x_t \sim N(0, I)` and :math:`E[\epsilon | x_t] = \sqrt{1 - \bar\alpha_t}\, x_t`
    (and :math:`E[v | x_t] = 0`): the gradient is that of :func:`denoising_loss` on Gaussian images
    without the noise of a sampled :math:`\epsilon`.

    Args:
        shape: (n, C, H, W) of the batch.

    Returns:
        0-d float32 loss.
    """
    x_t = surrogate_noise("gaussian", shape, generator=generator, device=device)
    if timesteps is None:
        timesteps = antithetic_timesteps(
            shape[0], scheduler.config.num_train_timesteps, generator=generator, device=device
        )
    spread, _ = noised(scheduler, torch.zeros_like(x_t), torch.ones_like(x_t), timesteps)
    epsilon = scheduler.config.prediction_type == "epsilon"
    target = spread * x_t if epsilon else torch.zeros_like(x_t)
    return reduce_loss(predict(model, x_t, timesteps, condition) - target, reduction)


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
    """The remember loss closer to eq. 7: match the frozen model's own prediction on noised x.

    Args:
        teacher: the frozen model; :func:`anchored` makes one from the optimizer's theta0.
        x, condition: replayed pairs, as for :func:`denoising_loss`.
        crossed: 1-d labels of all kept classes. Where given, each sample's condition is drawn anew
            from them, whatever its image shows ("crossed"): the function is held also where there
            is nothing to replay. `condition` is then not used.

    Returns:
        0-d float32 loss.
    """
    n = len(x)
    if timesteps is None:
        timesteps = antithetic_timesteps(
            n, scheduler.config.num_train_timesteps, generator=generator, device=x.device
        )
    if crossed is not None:
        source = generator.device if generator is not None else x.device
        pick = torch.randint(len(crossed), (n,), generator=generator, device=source)
        condition = crossed.to(x.device)[pick.to(x.device)]
    x_t, _ = noised(scheduler, x, randn(x.shape, generator, x), timesteps)
    with without_gradients():
        target = predict(teacher, x_t, timesteps, condition)
    return reduce_loss(predict(model, x_t, timesteps, condition) - target, reduction)


def anchored(model: nn.Module, optimizer: Any) -> Model:
    """The pretrained model in eval mode as a callable, from the theta0 that an EBUOptimizer holds.

    No second copy of the weights is made: parameters outside the optimizer are the model's own,
    and so are buffers, of which each call works on a copy. theta0 exists from the first phase on,
    where a penalty uses it or ``anchor=`` gave it.
    """

    def teacher(*args: Any, **kwargs: Any) -> Any:
        trained = optimizer.anchors()
        if not trained:
            raise RuntimeError(
                "anchored: the optimizer holds no theta0. It is taken at the first phase where a "
                "penalty uses it; with fisher=None or penalty='none' give the values to "
                "EBUOptimizer(anchor={p: p.detach() for p in model.parameters()})"
            )
        theta0 = {n: trained[p] for n, p in model.named_parameters() if p in trained}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with evaluating(model):
            return torch.func.functional_call(model, {**theta0, **buffers}, args, kwargs)

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

    Each sample gets Gaussian noise whose standard deviation is uniform in [0, scale * s], s being
    the standard deviation of the embedding's weights. Round the forget loss it makes the
    neighbourhood of the forgotten condition forgotten too.

    Args:
        embedding: e.g. ``unet.class_embedding``; its output has shape (n, ...).
        scale: >= 0; 1 goes up to the spread of the embedding itself.
        only: 1-d labels: the others stay as they are. For losses that run other conditions too,
            such as :func:`~ebu_optim.baselines.relabel_loss`; None is all.
    """
    if not scale >= 0:
        raise ValueError(f"scale must be >= 0; got {scale}")
    weight = next(embedding.parameters(), None)
    if weight is None:
        raise ValueError(f"embedding has no parameters to take its spread from; got {embedding!r}")
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
