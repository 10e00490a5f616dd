"""Noise schedules: their family, the timesteps, x_t, and the model's target at x_t."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import flow


def check_family(scheduler: Any) -> None:
    """Raise ValueError for a scheduler that is neither of DDPM's family nor of flow matching.

    The message names its class and what is missing or wrong.
    """
    if flow.is_flow(scheduler):
        flow.check(scheduler)
    else:
        check_variance_preserving(scheduler)


def check_variance_preserving(scheduler: Any) -> None:
    """Raise ValueError for a scheduler, or its saved configuration, that is not of DDPM's family.

    DDPM's family has betas over whole timesteps. Other configurations must be refused, because a
    DDPMScheduler would read them with its default betas.
    """
    saved = isinstance(scheduler, Mapping)
    config = scheduler if saved else scheduler.config
    name = str(config.get("_class_name")) if saved else type(scheduler).__name__
    if saved and not (config.get("beta_schedule") or config.get("trained_betas")):
        why = "has no beta_schedule in its configuration"
    elif not saved and getattr(scheduler, "alphas_cumprod", None) is None:
        why = "has no alphas_cumprod"
    elif _said(config, "use_flow_sigmas"):
        why = "has use_flow_sigmas"
    elif _said(config, "timestep_type") == "continuous":
        why = 'has timestep_type="continuous"'
    else:
        return
    raise ValueError(
        f"the scheduler {name} {why}; give one with a variance-preserving noise schedule over "
        "whole timesteps, such as DDPMScheduler. Flow matching is supported with "
        "FlowMatchEulerDiscreteScheduler, for models made for it; EDM is not supported"
    )


def prediction_type(scheduler: Any) -> str:
    """Return what a model of this scheduler, or of its saved configuration, predicts.

    Raises:
        ValueError: it is neither epsilon nor v_prediction, or the scheduler has another family.
    """
    check_variance_preserving(scheduler)
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    kind = _said(config, "prediction_type") or "epsilon"  # old configurations have no entry
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the scheduler's prediction_type is {kind!r}; the losses support epsilon and "
            "v_prediction"
        )
    return kind


def predicts_variance(scheduler: Any) -> bool:
    """Whether a model of this scheduler predicts twice as many channels, for the variance."""
    config = getattr(scheduler, "config", None)
    return _said(config, "variance_type") in ("learned", "learned_range")


def _said(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def antithetic_timesteps(
    n: int,
    num_timesteps: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return n timesteps in 0..T-1: n // 2 + 1 uniform draws, then their mirrors T-1-t, cut to n.

    Returns:
        (n,) int64 on `device`. The draws are made on the generator's device (on the CPU without a
        generator).
    """
    source = generator.device if generator is not None else "cpu"
    t = torch.randint(num_timesteps, (n // 2 + 1,), generator=generator, device=source)
    return torch.cat([t, num_timesteps - 1 - t])[:n].to(device)


def drawn(
    scheduler: Any, n: int, given: Tensor | None, generator: torch.Generator | None, device: Any
) -> Tensor:
    """Return the timesteps of a loss: the given ones, or antithetic or flow-matching draws."""
    check_family(scheduler)
    if given is not None:
        return given
    if flow.is_flow(scheduler):
        return flow.drawn(scheduler, (n,), generator, device)
    total = scheduler.config.num_train_timesteps
    return antithetic_timesteps(n, total, generator=generator, device=device)


def independent(
    scheduler: Any, shape: tuple[int, ...], generator: torch.Generator | None
) -> Tensor:
    """Return timesteps of a training step, sampled independently of each other; on the CPU."""
    if flow.is_flow(scheduler):
        return flow.drawn(scheduler, shape, generator, "cpu")
    return torch.randint(scheduler.config.num_train_timesteps, shape, generator=generator)


def noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return x_t and the model's target at x_t.

    For flow matching the target is the velocity, see `flow`. Otherwise it is epsilon or v:
    :math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon` and
    :math:`v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x`.

    ``scheduler.add_noise`` is not used, because schedulers such as EulerDiscrete scale x_t
    differently for their own sampling, while the model and its target are the same.

    The coefficients, the sum and v are float32 at least: in bfloat16 the first six
    :math:`1 - \bar\alpha_t` of DDPM are 0.

    Returns:
        x_t in the dtype of x; the target as the given epsilon, or as v in float32 or float64.
    """
    if flow.is_flow(scheduler):
        return flow.noised(scheduler, x, noise, t)
    kind = prediction_type(scheduler)
    wide = torch.promote_types(x.dtype, torch.float32)
    alpha_bar = scheduler.alphas_cumprod.to(x.device, wide)[t].view(-1, *[1] * (x.dim() - 1))
    signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    x_t = (signal * x + spread * noise).to(x.dtype)
    return x_t, noise if kind == "epsilon" else signal * noise - spread * x


def of_gaussian(scheduler: Any, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_t and the expected target at x_t for images that are standard Gaussian.

    Args:
        noise: standard Gaussian (n, C, H, W), float32.
    """
    if flow.is_flow(scheduler):
        return flow.of_gaussian(scheduler, noise, t)
    if prediction_type(scheduler) == "v_prediction":
        return noise, torch.zeros_like(noise)
    spread, _ = noised(scheduler, torch.zeros_like(noise), torch.ones_like(noise), t)
    return noise, spread * noise


def weights(scheduler: Any, t: Tensor) -> Tensor | None:
    """Return the weights of the samples' squared errors; None if all are 1 (not flow matching)."""
    return flow.weights(scheduler, t) if flow.is_flow(scheduler) else None
