"""Unlearning for generative models: a wrapper round any torch optimizer, and what goes with it."""

from .optimizer import EBUOptimizer

__version__ = "0.1.0"
__all__ = ["EBUOptimizer", "__version__"]
