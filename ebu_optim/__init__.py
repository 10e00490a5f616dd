"""Unlearning for generative models: a wrapper round any torch optimizer, and what goes with it."""

from .fisher import DiagonalFisher
from .optim import EBUOptimizer

__version__ = "0.1.0"
__all__ = ["DiagonalFisher", "EBUOptimizer", "__version__"]
