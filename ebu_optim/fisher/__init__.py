"""What must be kept: the diagonal of the Fisher information at the pretrained weights."""

from .diagonal import DiagonalFisher

__all__ = ["DiagonalFisher"]
