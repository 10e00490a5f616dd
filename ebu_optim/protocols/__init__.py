"""Published evaluations by name, so that figures can be compared with those of papers.

Each has one file. It says which images are generated, which judge is used and how the figures are
counted."""

from .._extras import require

require("transformers", "text-to-image")

from .named import PROTOCOLS, label, named, published
from .options import Evaluate
from .protocol import Asked, Protocol, Sampling, Seen
from .run import evaluate

__all__ = [
    "PROTOCOLS",
    "Asked",
    "Evaluate",
    "Protocol",
    "Sampling",
    "Seen",
    "evaluate",
    "label",
    "named",
    "published",
]
