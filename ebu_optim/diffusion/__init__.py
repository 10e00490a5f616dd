"""Everything specific to diffusion models: losses, sampling, replay and surrogate sets."""

from ..modules import evaluating, model_hash
from .adversary import Adversary
from .anchors import anchor_loss, random_anchors, transport
from .fisher import FisherBatches, fisher_loss
from .guidance import esd_loss, esd_target, partly_denoised
from .losses import (
    anchored,
    denoising_loss,
    distillation_loss,
    gaussian_forget_loss,
    noisy_condition,
    surrogate_noise,
)
from .relabel import next_class, relabel_loss
from .relearner import Relearner
from .sampling import sample, sample_set
from .schedules import antithetic_timesteps

__all__ = [
    "Adversary",
    "FisherBatches",
    "Relearner",
    "anchor_loss",
    "anchored",
    "antithetic_timesteps",
    "denoising_loss",
    "distillation_loss",
    "esd_loss",
    "esd_target",
    "evaluating",
    "fisher_loss",
    "gaussian_forget_loss",
    "model_hash",
    "next_class",
    "noisy_condition",
    "partly_denoised",
    "random_anchors",
    "relabel_loss",
    "sample",
    "sample_set",
    "surrogate_noise",
    "transport",
]
