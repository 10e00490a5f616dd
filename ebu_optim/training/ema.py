"""The exponential moving average (EMA) of the weights: diffusers' EMAModel, and the share of the
initial weights in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers.training_utils import EMAModel


class Ema:
    """diffusers' EMAModel, and the share that the initial weights still have in it."""

    def __init__(self, parameters: Any, decay: float, *, warm: bool) -> None:
        parameters = list(parameters)
        # warm: the full decay from the first step on, as if the average had been running before.
        # EMAModel uses a decay of 0 at its first step, regardless of min_decay.
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
    """The model, with the EMA's weights inside the block; unchanged if `ema` is None."""
    if ema is None:
        yield model
        return
    ema.model.store(model.parameters())
    ema.model.copy_to(model.parameters())
    try:
        yield model
    finally:
        ema.model.restore(model.parameters())
