"""Edits in closed form: what a cross-attention reads in a text embedding is another one's.

Keys and values of a text embedding c are W c. All of these edits change W on its right alone,

    W' = W R,

with one R of d_in x d_in numbers for every W that reads the same embeddings. So R is what `uce`,
`rece` and `speed` return, in float64, and `apply` is what multiplies a model's weights by it:

.. code-block:: python

    R = uce(embedded("a cat"), embedded("an animal"), preserve=embedded("a dog"))
    apply(pipeline.unet, R)

A bias is not touched: W' c + b is the target's W g + b.
"""

from ._embeddings import apply, gram
from .rece import adversarial, rece
from .speed import influential, null_space, speed
from .uce import uce

__all__ = ["adversarial", "apply", "gram", "influential", "null_space", "rece", "speed", "uce"]
