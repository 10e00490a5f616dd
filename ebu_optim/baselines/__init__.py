"""The methods that EBU is compared with. The same training loop runs all of them.

Each method has one file. docs/baselines.md has the equations, and the corrections to the published
code. This loop runs any method:

.. code-block:: python

    opt = methods[name].build(Adam(model.parameters(), lr=1e-4), max_grad_norm=1.0)
    for _ in range(steps):
        if "forget" in opt.needs:
            with opt.forget():
                forget_loss().backward()
        if "remember" in opt.needs:
            with opt.remember():
                remember_loss().backward()
        opt.step()
"""

from importlib import import_module
from typing import Any

from ._methods import closed_forms, methods, recipes
from ._recipe import Recipe
from ._recipe import Recipe as Method
from .aegis import AEGIS
from .embedding_only import EmbeddingOnly
from .erasediff import EraseDiff
from .esd import ESD
from .fine_tune import FineTune
from .gradient_ascent import GradientAscent
from .gru import GRU
from .gu import GU
from .jacobian_descent import JacobianDescent
from .joint import Joint
from .munba import MUNBa
from .pcgrad import PCGrad
from .random_masks import RandomMasks
from .restricted_gradient import RestrictedGradient
from .retrain import Retrain, reset_weights
from .sago import SAGO
from .salun import SalUn
from .selective_amnesia import SelectiveAmnesia, fisher_images, replayed_images
from .spm import SPM

__all__ = [
    "AEGIS",
    "ESD",
    "GRU",
    "GU",
    "SAGO",
    "SPM",
    "EmbeddingOnly",
    "EraseDiff",
    "FineTune",
    "GradientAscent",
    "JacobianDescent",
    "Joint",
    "MUNBa",
    "Method",
    "PCGrad",
    "RandomMasks",
    "Recipe",
    "RestrictedGradient",
    "Retrain",
    "SalUn",
    "SelectiveAmnesia",
    "anchor_loss",
    "closed_forms",
    "esd_loss",
    "esd_target",
    "fisher_images",
    "methods",
    "next_class",
    "partly_denoised",
    "random_anchors",
    "recipes",
    "relabel_loss",
    "replayed_images",
    "reset_weights",
    "transport",
]

_LOSSES = {
    "anchor_loss",
    "esd_loss",
    "esd_target",
    "next_class",
    "partly_denoised",
    "random_anchors",
    "relabel_loss",
    "transport",
}


def __getattr__(name: str) -> Any:
    """The losses of the methods, which have moved to `ebu_optim.diffusion`."""
    if name in _LOSSES:
        return getattr(import_module("ebu_optim.diffusion"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
