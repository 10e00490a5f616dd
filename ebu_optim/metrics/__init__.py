"""What was forgotten, what was kept, how deep it goes and how long it took; one metric a file."""

from .classifier import accuracy, classify, entropy, probability
from .fid import fid
from .frechet import classifier_frechet, frechet_distance
from .inversion import inversion
from .limits import classifier_metrics
from .protocol import check_protocol, versions
from .relearn_steps import relearn_steps
from .unlearn_steps import unlearn_steps

__all__ = [
    "accuracy",
    "check_protocol",
    "classifier_frechet",
    "classifier_metrics",
    "classify",
    "entropy",
    "fid",
    "frechet_distance",
    "inversion",
    "probability",
    "relearn_steps",
    "unlearn_steps",
    "versions",
]
