"""Class-conditional models: UNets and classifiers, their sets, their evaluation."""

from .._extras import require

require("diffusers", "examples")
