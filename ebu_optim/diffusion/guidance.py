"""ESD's loss: guidance away from a condition, at points on the way from noise."""

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

#: eta of the two published targets, which are the same for c_from = c.
ETA = {"paper": 1.0, "released": 2.0}


def esd_target(
    eps_c: Tensor, eps_null: Tensor, *, eta: float, eps_from: Tensor | None = None
) -> Tensor:
    r"""What the condition is to predict, of the frozen model's predictions (one shape).

    .. math:: \epsilon_{\text{from}} - \eta\, (\epsilon_c - \epsilon_\varnothing)

    The paper starts from the unconditional prediction (``eps_from=None``), eta = 1; the newer code
    from that of a condition c_from, by default c itself, eta = 2, which is then the paper's with
    eta - 1. Being affine in the prediction with weights that add up to 1, it is the same target
    whether the model predicts epsilon, v or the velocity of flow matching.
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
    """Squared distance of the model's prediction from :func:`esd_target`.

    Args:
        model, teacher: the trained and the frozen model, as for
            :func:`~ebu_optim.diffusion.distillation_loss`.
        x_t, t: (n, C, H, W) and (n,), e.g. of :func:`partly_denoised`.
        condition, null: what is to be forgotten, and the empty condition; n rows each.
        variant: "paper" or "released": where the target starts.
        eta: None is 1 for "paper", 2 for "released".
        erase_from: c_from of "released": what is trained, and where its target starts; None is
            `condition`.
        scheduler: needed for a model that predicts a variance too, alone.
        reduction: over C, H, W: "mean" (ESD) or "sum".

    Returns:
        0-d float32 loss.
    """
    if variant not in ETA:
        raise ValueError(f'variant must be "paper" or "released"; got {variant!r}')
    if erase_from is not None and variant == "paper":
        raise ValueError('erase_from belongs to variant="released"; the paper starts from null')
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
    """x_t after k steps of sampling with guidance, k uniform, the same for the whole batch.

    It is as the model sees it, whatever scale the sampler's own state has (Euler, Heun, LMS): of
    variance 1 at the start, as the losses make it.

    ESD's paper samples from the model that is trained and draws t in the bin; its newer code
    samples from the frozen one and takes t itself. SPM samples with its adapter from the first
    step on (``earliest=1``), 30 steps.

    Args:
        model, scheduler, condition, null, shape: as for :func:`~ebu_optim.diffusion.sample`; a
            DDIMScheduler takes one step a timestep; others of its family may take more, and each
            of them counts for k.
        earliest: least k; the greatest is ``len(scheduler.timesteps) - 1``.
        within_bin: t is uniform among the ``T / num_inference_steps`` timesteps of the step's bin
            instead of ``scheduler.timesteps[k]``; of flow matching, any between this one and the
            next.

    Returns:
        x_t (n, C, H, W) and t (n,) int64, or float32 where the sampler is between two timesteps or
        of flow matching.

    Raises:
        ValueError: as of :func:`~ebu_optim.diffusion.sample`; `earliest` out of range.
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
        steps = scheduler.timesteps.unique()  # Heun's come twice
        total, left = scheduler.config.num_train_timesteps, int((steps < t).sum())
        edges = [round(total * i / len(steps)) for i in (left, left + 1)]
        t = draw(*edges)
    return x_t, torch.full((len(x_t),), int(t) if t == int(t) else t, device=device)
