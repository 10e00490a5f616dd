"""AdvUnlearn: ESD's loss at conditions that an adversary trains against the model."""

from __future__ import annotations

from ._recipe import recipe
from .joint import Joint

#: What it learns from: G is the plain sum's. The published retain weight is 0.3.
RECIPE = recipe(
    "AdvUnlearn",
    Joint,
    strength="forget_weight",
    forgets="guidance",
    adversary={"steps": 30, "restart": 1, "weight": 1.0, "loss": "teacher"},
    published={"forget_weight": 1 / 0.3},
)
