"""The earlier place of EBUOptimizer."""

from .optim import EBUOptimizer

__all__ = ["EBUOptimizer"]
