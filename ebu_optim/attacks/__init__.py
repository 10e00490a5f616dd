"""How deep forgetting goes: a text-to-image model is asked in other words, by a learned word, and
after it was trained again."""

from .._extras import require

require("transformers", "text-to-image")
