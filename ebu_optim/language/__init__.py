"""What the losses of a language model are, and how much of an answer is left."""

from .losses import (
    IGNORED,
    answer_nll,
    answer_probability,
    ascent_loss,
    npo_loss,
    simnpo_loss,
    truth_ratio,
)

__all__ = [
    "IGNORED",
    "answer_nll",
    "answer_probability",
    "ascent_loss",
    "npo_loss",
    "simnpo_loss",
    "truth_ratio",
]
