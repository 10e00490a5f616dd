"""What a noise schedule says: its family, the timesteps, x_t and the model's target there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import flow


def check_family(scheduler: Any) -> None:
    """Refuse a scheduler that is neither of DDPM's family nor of flow matching.

    Raises:
        ValueError: naming its class and what is missing, or what there is instead.
    """
    if flow.is_flow(scheduler):
        flow.check(scheduler)
    else:
        check_variance_preserving(scheduler)


def check_variance_preserving(scheduler: Any) -> None:
    """Refuse a scheduler, or its saved configuration, that is not of DDPM's family: betas over
    whole timesteps. Such a configuration read as a DDPMScheduler's gives its default betas.

    Raises:
        ValueError: as of `check_family`.
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
        f"the scheduler {name} {why}: known is a variance-preserving noise schedule over whole "
        "timesteps, such as DDPMScheduler's; flow matching (known as FlowMatchEulerDiscrete, for "
        "models made for it) and EDM are other models"
    )


def prediction_type(scheduler: Any) -> str:
    """What a model of this scheduler, or of its saved configuration, predicts.

    Raises:
        ValueError: neither epsilon nor v_prediction, or another family.
    """
    check_variance_preserving(scheduler)
    config = scheduler if isinstance(scheduler, Mapping) else scheduler.config
    kind = _said(config, "prediction_type") or "epsilon"  # all there was before there was the entry
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the scheduler's prediction_type is {kind!r}; the losses know epsilon and v_prediction"
        )
    return kind


def predicts_variance(scheduler: Any) -> bool:
    """Whether a model of this scheduler predicts as many channels again, for the variance."""
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
    """n timesteps in 0..T-1: n // 2 + 1 uniform draws, then their mirror images T-1-t, cut to n.

    Returns:
        (n,) int64 on `device`. The draw is made on the generator's device (CPU without one).
    """
    source = generator.device if generator is not None else "cpu"
    t = torch.randint(num_timesteps, (n // 2 + 1,), generator=generator, device=source)
    return torch.cat([t, num_timesteps - 1 - t])[:n].to(device)


def drawn(
    scheduler: Any, n: int, given: Tensor | None, generator: torch.Generator | None, device: Any
) -> Tensor:
    """The timesteps of a loss: those given, or antithetic ones, or those of flow matching."""
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
    """Timesteps of a training step, each drawn by itself; on the CPU."""
    if flow.is_flow(scheduler):
        return flow.drawn(scheduler, shape, generator, "cpu")
    return torch.randint(scheduler.config.num_train_timesteps, shape, generator=generator)


def noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""x_t and the model's target there: the velocity of flow matching, see `flow`; epsilon or v:
    :math:`x_t = \sqrt{\bar\alpha_t}\, x + \sqrt{1 - \bar\alpha_t}\, \epsilon` and
    :math:`v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, x`.

    Not by ``scheduler.add_noise``: schedulers such as EulerDiscrete scale x_t in another way for
    their own sampling, while the model and its target are the same.

    The coefficients, the sum and v are float32 at least: in bfloat16 the first six
    :math:`1 - \bar\alpha_t` of DDPM are 0.

    Returns:
        x_t in the dtype of x; the target as epsilon was given, or v in float32 or float64.
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
    """x_t and the expected target there for images that are standard Gaussian.

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
    """Of each sample's squared error; None: all are 1, as on every schedule but flow matching's."""
    return flow.weights(scheduler, t) if flow.is_flow(scheduler) else None
