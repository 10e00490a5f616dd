"""Small worlds in which everything runs on a laptop: data, models, judges."""

from .._extras import require

require("sklearn", "examples")
