r"""Flow matching, as diffusers' FlowMatchEulerDiscreteScheduler has it: for sigma in [0, 1]

.. math:: z = (1 - \sigma)\, x + \sigma\, \epsilon, \qquad v = \epsilon - x,

and a model that predicts the velocity v. A timestep is :math:`1000 \sigma`, a float: x_t of the
losses is z there. Which sigmas are learned at is diffusers' `weighting_scheme`, an entry of the
scheduler's configuration (``scheduler.register_to_config(weighting_scheme="logit_normal")``);
without it they are uniform before the shift, and weigh alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NAME = "FlowMatchEulerDiscreteScheduler"
SCHEMES = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
#: As diffusers' training scripts have it.
DENSITY = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}


def is_flow(scheduler: Any) -> bool:
    """Of a scheduler, or of its saved configuration."""
    if isinstance(scheduler, Mapping):
        return scheduler.get("_class_name") == NAME
    return any(kind.__name__ == NAME for kind in type(scheduler).__mro__)


def check(scheduler: Any) -> None:
    """Raises:
    ValueError: sigma is 1 for an image, not for noise; an unknown weighting_scheme.
    """
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(f"the scheduler {NAME} has invert_sigmas: known is sigma = 1 for noise")
    if (scheme := _scheme(scheduler)) not in SCHEMES:
        raise ValueError(
            f"the scheduler's weighting_scheme is {scheme!r}; there is {', '.join(SCHEMES)}"
        )


def set_timesteps(scheduler: Any, n: int) -> None:
    """Raises:
    ValueError: the scheduler shifts its steps by the picture's size, which nothing here says.
    """
    plain = type(scheduler).__name__ == NAME  # others may know their picture's size
    if plain and scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"the scheduler {NAME} has use_dynamic_shifting: its steps depend on the picture's "
            f"size; give one for this size, {NAME}.from_config(scheduler.config, "
            "use_dynamic_shifting=False, shift=exp(mu)), with the mu of the model's pipeline"
        )
    scheduler.set_timesteps(n)


def drawn(
    scheduler: Any, shape: tuple[int, ...], generator: torch.Generator | None, device: Any
) -> Tensor:
    """Timesteps float32 of `shape`, drawn on the generator's device (CPU without one) among those
    of a scheduler that has not sampled yet: with its static shift; dynamic ones have none.

    Raises:
        ValueError: a diffusers whose draws take no generator.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    n = int(torch.Size(shape).numel())
    more: dict[str, Any] = {}
    if generator is not None:
        if "generator" not in inspect.signature(density).parameters:
            raise ValueError("flow matching by a generator needs a newer diffusers: update it")
        more = {"generator": generator, "device": generator.device}
    u = density(_scheme(scheduler), n, **DENSITY, **more)
    points = _timesteps(
        scheduler.config.num_train_timesteps,
        scheduler.config.shift,
        bool(scheduler.config.use_dynamic_shifting),
    )
    # in float32 sigmoid(17) is 1
    index = (u.cpu() * len(points)).long().clamp_(max=len(points) - 1)
    return points[index].view(shape).to(device)


def noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """z, in the dtype of x, and the velocity, in float32 or float64."""
    sigma = _sigma(scheduler, x, t)
    wide = noise.to(sigma.dtype)
    return ((1 - sigma) * x + sigma * noise).to(x.dtype), wide - x


def of_gaussian(scheduler: Any, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""z, and the velocity that is expected there, where x is Gaussian too: z is Gaussian with the
    variance :math:`s = (1 - \sigma)^2 + \sigma^2`, and :math:`E[v | z] = (2 \sigma - 1)\, z / s`.

    Args:
        noise: standard Gaussian, which becomes z.
    """
    sigma = _sigma(scheduler, noise, t)
    variance = (1 - sigma) ** 2 + sigma**2
    z = variance.sqrt() * noise
    return z, (2 * sigma - 1) / variance * z


def weights(scheduler: Any, t: Tensor) -> Tensor | None:
    """Of each sample's squared error; None: all are 1."""
    if (scheme := _scheme(scheduler)) not in ("sigma_sqrt", "cosmap"):
        return None
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return compute_loss_weighting_for_sd3(scheme, t / scheduler.config.num_train_timesteps)


def _scheme(scheduler: Any) -> str:
    return scheduler.config.get("weighting_scheme") or "none"


def _sigma(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """Float32 at least, and of as many dimensions as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sigma = t.to(x.device, wide) / scheduler.config.num_train_timesteps
    return sigma.view(-1, *[1] * (x.dim() - 1))


@lru_cache(maxsize=8)
def _timesteps(total: int, shift: float, dynamic: bool) -> Tensor:
    """After sampling a scheduler holds other ones."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=total, shift=shift, use_dynamic_shifting=dynamic
    ).timesteps
