"""What a classifier says of generated images; one metric a file."""

from .classifier import accuracy, classify, entropy, probability

__all__ = ["accuracy", "classify", "entropy", "probability"]
