"""Text-to-image models: pipelines and their families, prompts, trained modules, sets, the memory
count, saving and opening of results, and evaluation. Each part has its own file."""

from .._extras import require

require("transformers", "text-to-image")
