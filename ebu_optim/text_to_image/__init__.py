"""What a text-to-image model is: pipelines and their families, prompts, what is trained, sets,
memory counted, results saved and opened, and the evaluation of what is drawn. One part a file."""

from .._extras import require

require("transformers", "text-to-image")
