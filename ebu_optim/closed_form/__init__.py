"""Edits in closed form: cross-attention layers read one text embedding like another one.

Keys and values of a text embedding c are W c. All of these edits change W only from the right,

    W' = W R,

with one matrix R, d_in x d_in, for every W that reads the same embeddings. `uce`, `rece` and
`speed` return R in float64, and `apply` multiplies a model's weights by it:

.. code-block:: python

    R = uce(embedded("a cat"), embedded("an animal"), preserve=embedded("a dog"))
    apply(pipeline.unet, R)

A bias is not changed: W' c + b is the target's W g + b.
"""

from ._embeddings import CROSS_ATTENTION, apply, gram
from .rece import adversarial, rece
from .speed import influential, invariants, null_space, speed
from .uce import uce

__all__ = [
    "CROSS_ATTENTION",
    "adversarial",
    "apply",
    "gram",
    "influential",
    "invariants",
    "null_space",
    "rece",
    "speed",
    "uce",
]
