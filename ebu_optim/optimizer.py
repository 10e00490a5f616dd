"""The earlier import path of EBUOptimizer."""

from .optim import EBUOptimizer

__all__ = ["EBUOptimizer"]
