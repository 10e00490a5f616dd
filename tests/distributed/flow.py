"""`ebu forget` on families with a transformer, as one process with a batch of two or as two with a
batch of one: `train`; a rank of the two runs this file with a folder."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode

from ebu_optim.takedown import forget
from ebu_optim.text_to_image import unlearn
from ebu_optim.text_to_image.objectives import TextObjectives

from ..flow_families import size
from ..scripts import reset_accelerate
from .launch import join, leave

RANK, RANKS = (int(os.environ.get(name, given)) for name, given in (("RANK", 0), ("WORLD_SIZE", 1)))
DRAWS = (torch.rand, torch.randn, torch.randint, torch.normal)


class Rows(TorchFunctionMode):
    """Draws a number for each rank's sample and takes this rank's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in DRAWS:
            return func(*args, **kwargs)
        args = tuple(map(_joined, args))
        return func(*args, **{n: _joined(v) for n, v in kwargs.items()})[RANK : RANK + 1]


def _joined(given: Any) -> Any:
    return (RANKS * given[0], *given[1:]) if isinstance(given, tuple) else given


class Same(TextObjectives):
    """The noise of a micro-batch, whoever has which part of it."""

    def forget(self) -> torch.Tensor:
        return self.drawn(2 * self.i, super().forget)

    def remember(self) -> torch.Tensor:
        return self.drawn(2 * self.i + 1, super().remember)

    def drawn(self, seed: int, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        torch.manual_seed(seed)
        with Rows() if RANKS > 1 else contextlib.nullcontext():
            return loss()


LORA = {"train_modules": "lora", "save_as": "lora"}
#: Name of a run -> the model and the options.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in ("sd3", "flux_dev", "klein", "z_image", "pixart", "sana", "qwen_image")
    },
    "lora": ("sd3", LORA),
    "int8": ("z_image", {**LORA, "quantize": "int8"}),
}


def train(folder: Path, run: str) -> Path:
    """The output folder of a request to a model in `folder`."""
    reset_accelerate()
    name, more = RUNS[run]
    out = folder / f"{run}_by_{RANKS}"
    own, unlearn.TextObjectives = unlearn.TextObjectives, Same
    try:
        forget(
            str(folder / name),
            "cat",
            keep=["a dog", "a red car"],
            output_dir=out,
            sets_dir=folder / f"sets_{name}",
            preset="paper",
            cpu=True,
            resolution=size(folder / name),
            num_inference_steps=2,
            max_train_steps=3,
            replay_images=4,
            surrogate_images=4,
            train_batch_size=2 // RANKS,
            validation_steps=0,
            evidence_images=1,
            evidence_prompts=1,
            clip_weights="none",
            learning_rate=1e-3,
            **more,
        )
    finally:
        unlearn.TextObjectives = own
    return out


if __name__ == "__main__":
    join()
    # a run that ends would end the group, and the next one begin another on a port of its own
    PartialState.destroy_process_group = lambda *_: None
    for run in sys.argv[2:]:
        train(Path(sys.argv[1]), run)
    leave()
