"""Whose numbers do mine stand beside? Published evaluations by name: one file each, which says
what is drawn, who judges and how it is counted."""

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
