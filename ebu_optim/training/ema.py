"""The moving average of the weights: diffusers' EMAModel, and the share of its start in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel


class Ema:
    """diffusers' EMAModel, and the share of its start that is still in it."""

    def __init__(self, parameters: Any, decay: float, *, warm: bool) -> None:
        parameters = list(parameters)
        # warm: from the first step on with the full decay, as if it had been running all the time;
        # EMAModel takes 0 at its first step whatever min_decay says
        self.model = EMAModel(parameters, decay=decay, min_decay=decay if warm else 0.0)
        self.model.optimization_step = 1 if warm else 0
        self.share = 1.0

    def step(self, parameters: Any) -> None:
        self.model.step(parameters)
        self.share *= float(self.model.cur_decay_value or 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.model.state_dict(), "share": self.share}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["ema"])
        self.share = state["share"]


@contextmanager
def averaged(model: Any, ema: Ema | None) -> Iterator[Any]:
    """The model with its EMA's weights inside the block; with its own where there is no EMA."""
    if ema is None:
        yield model
        return
    ema.model.store(model.parameters())
    ema.model.copy_to(model.parameters())
    try:
        yield model
    finally:
        ema.model.restore(model.parameters())
