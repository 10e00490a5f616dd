"""ESD's loss: guidance away from a condition, at points of a sampling run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modules import without_gradients
from .conditions import Condition
from .flow import is_flow
from .losses import Model, predict, reduce_loss
from .sampling import sample
from .schedules import check_family

#: eta of the two published targets. The targets are equal if c_from = c.
ETA = {"paper": 1.0, "released": 2.0}


def esd_target(
    eps_c: Tensor, eps_null: Tensor, *, eta: float, eps_from: Tensor | None = None
) -> Tensor:
    r"""Return the target of the condition, from the frozen model's predictions (of one shape).

    .. math:: \epsilon_{\text{from}} - \eta\, (\epsilon_c - \epsilon_\varnothing)

    The paper starts from the unconditional prediction (``eps_from=None``) with eta = 1. The newer
    code starts from the prediction of a condition c_from, by default c itself, with eta = 2; for
    c_from = c this equals the paper's target with eta - 1. The target is affine in the predictions
    with weights that add up to 1, so it is the same whether the model predicts epsilon, v or the
    velocity of flow matching.
    """
    start = eps_null if eps_from is None else eps_from
    return start - eta * (eps_c - eps_null)


def esd_loss(
    model: Model,
    teacher: Model,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    null: Condition,
    *,
    variant: str = "paper",
    eta: float | None = None,
    erase_from: Condition | None = None,
    scheduler: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the squared distance of the model's prediction from :func:`esd_target`.

    Args:
        model, teacher: the trained and the frozen model, as for
            :func:`~ebu_optim.diffusion.distillation_loss`.
        x_t, t: (n, C, H, W) and (n,), e.g. from :func:`partly_denoised`.
        condition, null: the condition to forget, and the empty condition; n rows each.
        variant: "paper" or "released": where the target starts.
        eta: None is 1 for "paper", 2 for "released".
        erase_from: c_from of "released", the condition that is trained and at which the target
            starts; None is `condition`.
        scheduler: only needed for a model that also predicts a variance.
        reduction: over C, H, W: "mean" (ESD) or "sum".

    Returns:
        0-d float32 loss.

    Raises:
        ValueError: `variant` is unknown, or `erase_from` is given with "paper".
    """
    if variant not in ETA:
        raise ValueError(f'variant must be "paper" or "released"; got {variant!r}')
    if erase_from is not None and variant == "paper":
        raise ValueError(
            'erase_from is given with variant="paper", which starts from null; use '
            'variant="released", or leave erase_from out'
        )
    eta = ETA[variant] if eta is None else eta
    trained = condition if erase_from is None else erase_from
    with without_gradients():
        eps_null, eps_c = (
            predict(teacher, x_t, t, c, scheduler).float() for c in (null, condition)
        )
        start = None if variant == "paper" else eps_c
        if erase_from is not None:
            start = predict(teacher, x_t, t, erase_from, scheduler).float()
        target = esd_target(eps_c, eps_null, eta=eta, eps_from=start)
    return reduce_loss(predict(model, x_t, t, trained, scheduler) - target, reduction)


def partly_denoised(
    model: Model,
    scheduler: Any,
    condition: Condition,
    null: Condition | int,
    shape: tuple[int, ...],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 3.0,
    earliest: int = 0,
    within_bin: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return x_t after k steps of guided sampling; k is uniform and the same for the whole batch.

    x_t is scaled as the model sees it, with variance 1 at the start, as in the losses. The
    sampler's own state may have another scale (Euler, Heun, LMS).

    ESD's paper samples from the trained model, and t within the bin. Its newer code samples
    from the frozen model and uses the timestep itself. SPM samples with its adapter from the first
    step on (``earliest=1``), with 30 steps.

    Args:
        model, scheduler, condition, null, shape: as for :func:`~ebu_optim.diffusion.sample`. A
            DDIMScheduler takes one step per timestep; others of its family may take more, and k
            counts each of them.
        earliest: the least k; the greatest is ``len(scheduler.timesteps) - 1``.
        within_bin: sample t uniformly from the ``T / num_inference_steps`` timesteps of the step's
            bin instead of using ``scheduler.timesteps[k]``; for flow matching, t lies anywhere
            between this timestep and the next.

    Returns:
        x_t (n, C, H, W) and t (n,) int64. t is float32 for flow matching, and if the sampler is
        between two timesteps.

    Raises:
        ValueError: as for :func:`~ebu_optim.diffusion.sample`; `earliest` is out of range.
    """
    check_family(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    points = len(scheduler.timesteps)
    if not 0 <= earliest < points:
        raise ValueError(
            f"earliest must be in [0, {points}), the points of num_inference_steps="
            f"{num_inference_steps}; got {earliest}"
        )
    source = generator.device if generator is not None else "cpu"

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator, device=source))

    k = draw(earliest, points)
    x_t = sample(
        model,
        scheduler,
        condition,
        shape,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        null_condition=null,
        clip=False,
        stop_after=k,
        generator=generator,
        device=device,
    )
    t = float(scheduler.timesteps[k])
    if is_flow(scheduler):
        if within_bin:
            end = float(scheduler.timesteps[k + 1]) if k + 1 < points else 0.0
            share = torch.rand((), generator=generator, device=source).item()
            t -= (t - end) * share  # less than 1: t is not 0
        return x_t, torch.full((len(x_t),), t, device=device)
    if within_bin:
        steps = scheduler.timesteps.unique()  # Heun has most timesteps twice
        total, left = scheduler.config.num_train_timesteps, int((steps < t).sum())
        edges = [round(total * i / len(steps)) for i in (left, left + 1)]
        t = draw(*edges)
    return x_t, torch.full((len(x_t),), int(t) if t == int(t) else t, device=device)
