"""Small worlds of data, models and judges in which everything runs on a laptop."""

from .._extras import require

require("sklearn", "examples")
