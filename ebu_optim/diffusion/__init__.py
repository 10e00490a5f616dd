"""All that knows what a diffusion model is: losses, sampling, replay and surrogate sets."""

from ..modules import evaluating, model_hash
from .fisher import FisherBatches, fisher_loss
from .losses import (
    anchored,
    antithetic_timesteps,
    denoising_loss,
    distillation_loss,
    gaussian_forget_loss,
    noisy_condition,
    surrogate_noise,
)
from .sampling import sample, sample_set

__all__ = [
    "FisherBatches",
    "anchored",
    "antithetic_timesteps",
    "denoising_loss",
    "distillation_loss",
    "evaluating",
    "fisher_loss",
    "gaussian_forget_loss",
    "model_hash",
    "noisy_condition",
    "sample",
    "sample_set",
    "surrogate_noise",
]
