"""How two gradients become one step: the engine, the paper's rule, and rules that users write."""

from ._holding import Holding, TensorMap
from .ebu import EBUOptimizer
from .phased import PhasedOptimizer
from .rule import Rule, Slot, Step
from .weighted_sum import WeightedSum

__all__ = [
    "EBUOptimizer",
    "Holding",
    "PhasedOptimizer",
    "Rule",
    "Slot",
    "Step",
    "TensorMap",
    "WeightedSum",
]
