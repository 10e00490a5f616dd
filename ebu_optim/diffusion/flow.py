r"""Flow matching, as in diffusers' FlowMatchEulerDiscreteScheduler: for sigma in [0, 1]

.. math:: z = (1 - \sigma)\, x + \sigma\, \epsilon, \qquad v = \epsilon - x,

and the model predicts the velocity v. A timestep is :math:`1000 \sigma`, a float; x_t in the losses
is z. diffusers' `weighting_scheme` decides how sigma is sampled and weighted. It is an entry of the
scheduler's configuration (``scheduler.register_to_config(weighting_scheme="logit_normal")``).
Without it, sigma is uniform before the shift, and all weights are equal.
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
#: The values of diffusers' training scripts.
DENSITY = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler, or its saved configuration, is one of flow matching."""
    if isinstance(scheduler, Mapping):
        return scheduler.get("_class_name") == NAME
    return any(kind.__name__ == NAME for kind in type(scheduler).__mro__)


def check(scheduler: Any) -> None:
    """Raise ValueError if the scheduler inverts sigma or has an unknown weighting_scheme."""
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(
            f"the scheduler {NAME} has invert_sigmas, but sigma must be 1 for noise; set "
            "invert_sigmas=False"
        )
    if (scheme := _scheme(scheduler)) not in SCHEMES:
        raise ValueError(
            f"the scheduler's weighting_scheme is {scheme!r}; use one of {', '.join(SCHEMES)}"
        )


def set_timesteps(scheduler: Any, n: int) -> None:
    """Set n sampling steps.

    Raises:
        ValueError: the scheduler shifts its steps by the image's size, which is unknown here.
    """
    plain = type(scheduler).__name__ == NAME  # subclasses may know the image's size
    if plain and scheduler.config.get("use_dynamic_shifting"):
        raise ValueError(
            f"the scheduler {NAME} has use_dynamic_shifting, so its steps depend on the image's "
            f"size; give one for this size, {NAME}.from_config(scheduler.config, "
            "use_dynamic_shifting=False, shift=exp(mu)), with the mu of the model's pipeline"
        )
    scheduler.set_timesteps(n)


def drawn(
    scheduler: Any, shape: tuple[int, ...], generator: torch.Generator | None, device: Any
) -> Tensor:
    """Sample timesteps, float32 of `shape`, from those of a scheduler that was not yet used.

    They are sampled on the generator's device (on the CPU without one). A static shift is included;
    dynamic shifting adds none.

    Raises:
        ValueError: diffusers is too old to sample with a generator.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    n = int(torch.Size(shape).numel())
    more: dict[str, Any] = {}
    if generator is not None:
        if "generator" not in inspect.signature(density).parameters:
            raise ValueError(
                "flow matching with a generator needs a newer diffusers; upgrade diffusers"
            )
        more = {"generator": generator, "device": generator.device}
    u = density(_scheme(scheduler), n, **DENSITY, **more)
    points = _timesteps(
        scheduler.config.num_train_timesteps,
        scheduler.config.shift,
        bool(scheduler.config.use_dynamic_shifting),
    )
    # sigmoid(17) is 1 in float32
    index = (u.cpu() * len(points)).long().clamp_(max=len(points) - 1)
    return points[index].view(shape).to(device)


def noised(scheduler: Any, x: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return z, in the dtype of x, and the velocity, in float32 or float64."""
    sigma = _sigma(scheduler, x, t)
    wide = noise.to(sigma.dtype)
    return ((1 - sigma) * x + sigma * noise).to(x.dtype), wide - x


def of_gaussian(scheduler: Any, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return z, and the expected velocity at z for images x that are Gaussian too.

    Then z is Gaussian with the variance :math:`s = (1 - \sigma)^2 + \sigma^2`, and
    :math:`E[v | z] = (2 \sigma - 1)\, z / s`.

    Args:
        noise: standard Gaussian, which is scaled to z.
    """
    sigma = _sigma(scheduler, noise, t)
    variance = (1 - sigma) ** 2 + sigma**2
    z = variance.sqrt() * noise
    return z, (2 * sigma - 1) / variance * z


def weights(scheduler: Any, t: Tensor) -> Tensor | None:
    """Return the weight of each sample's squared error; None if all are 1."""
    if (scheme := _scheme(scheduler)) not in ("sigma_sqrt", "cosmap"):
        return None
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    return compute_loss_weighting_for_sd3(scheme, t / scheduler.config.num_train_timesteps)


def _scheme(scheduler: Any) -> str:
    return scheduler.config.get("weighting_scheme") or "none"


def _sigma(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    """Return sigma in float32 at least, with as many dimensions as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    sigma = t.to(x.device, wide) / scheduler.config.num_train_timesteps
    return sigma.view(-1, *[1] * (x.dim() - 1))


@lru_cache(maxsize=8)
def _timesteps(total: int, shift: float, dynamic: bool) -> Tensor:
    """Return a new scheduler's timesteps; after sampling, a scheduler holds different ones."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=total, shift=shift, use_dynamic_shifting=dynamic
    ).timesteps
