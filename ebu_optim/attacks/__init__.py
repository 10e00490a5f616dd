"""How deep forgetting goes: attacks on a text-to-image model by paraphrases, learned words and
further training."""

from .._extras import require

require("transformers", "text-to-image")
