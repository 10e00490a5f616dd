"""What was forgotten, what was kept, how deep it goes and how long it took; one metric per file."""

from ._weights import NotComputed
from .classifier import accuracy, classify, entropy, probability
from .clip_score import ClipClassifier, ClipCosine, clip_score
from .depth import (
    condition_replaced,
    learn_embedding,
    learn_embeddings,
    relearn,
    relearning,
)
from .fid import fid
from .frechet import classifier_frechet, frechet_distance
from .imagenette import ImagenetteClassifier, imagenette_metrics
from .inversion import inversion
from .limits import classifier_metrics
from .lpips_distance import LpipsDistance, lpips_distance
from .nudity import NudityDetector, nudity_score
from .protocol import check_protocol, versions
from .relearn_steps import relearn_steps
from .unlearn_steps import unlearn_steps
from .unlearncanvas import UnlearnCanvasClassifier

__all__ = [
    "ClipClassifier",
    "ClipCosine",
    "ImagenetteClassifier",
    "LpipsDistance",
    "NotComputed",
    "NudityDetector",
    "UnlearnCanvasClassifier",
    "accuracy",
    "check_protocol",
    "classifier_frechet",
    "classifier_metrics",
    "classify",
    "clip_score",
    "condition_replaced",
    "entropy",
    "fid",
    "frechet_distance",
    "imagenette_metrics",
    "inversion",
    "learn_embedding",
    "learn_embeddings",
    "lpips_distance",
    "nudity_score",
    "probability",
    "relearn",
    "relearn_steps",
    "relearning",
    "unlearn_steps",
    "versions",
]
