"""Unlearning for generative models: a wrapper around any torch optimizer, with its tools."""

from typing import TYPE_CHECKING, Any

from .fisher import DiagonalFisher
from .optim import EBUOptimizer

if TYPE_CHECKING:
    from .takedown import forget

__version__ = "0.2.0"
__all__ = ["DiagonalFisher", "EBUOptimizer", "__version__", "forget"]


def __getattr__(name: str) -> Any:
    """`forget` brings diffusers and transformers, which an import of the core does not need."""
    if name == "forget":
        from .takedown import forget

        return forget
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
