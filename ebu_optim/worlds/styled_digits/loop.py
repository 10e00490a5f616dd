"""The loop that trains each of the world's models: AdamW, a schedule, checkpoints, an average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ... import training
from ...errors import InputError
from ...training.ema import Ema
from ...training.fields import at_least, option
from ...training.options import SCHEDULES, TrainingOptions

Options = TypeVar("Options", bound="LoopOptions")


@dataclass(frozen=True, kw_only=True)
class LoopOptions(TrainingOptions):
    """How a model of the world is trained."""

    train_batch_size: int = option(64, help="Batch size of each process.")
    learning_rate: float = option(2e-3, help="Learning rate.")
    lr_scheduler: str = option("cosine", choices=SCHEDULES, help="Schedule of the learning rate.")
    max_train_samples: int | None = option(None, help="Use only so many digits, for a try.")

    def __post_init__(self) -> None:
        self.check_training()
        at_least(self, 1, "max_train_samples")

    def stage(self: Options, name: str, **options: Any) -> Options:
        """The options of one of several models that a command trains, each in its own folder."""
        return replace(self, output_dir=self.output_dir / name, **options)


def new_accelerator(args: LoopOptions) -> Any:
    accelerator = training.new_accelerator(args)
    if accelerator.num_processes > 1:
        raise InputError(
            f"{accelerator.num_processes} processes were started; these models are too small to "
            "share: start one"
        )
    return accelerator


def fit(
    args: LoopOptions,
    accelerator: Any,
    script: str,
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    finish: Callable[[Ema | None], None],
    *,
    same: dict[str, Any] | None = None,
    ema_decay: float | None = None,
    parts: tuple[str, ...] = (),
) -> None:
    """Train `model` for --max_train_steps, or go on where that was interrupted; then `finish`.

    Args:
        script: what is trained, for the run's identity and its bar.
        loss: of a batch that it draws from torch's random stream, a 0-d tensor.
        finish: called with the average, while the output folder is held.
        same: what a resumed run must agree in, beside the options.
        ema_decay: of the average of the weights; None keeps none.
        parts: of the result, removed where the run begins anew.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    training.fit(
        args,
        accelerator,
        script,
        model,
        optimizer,
        lambda prepared, _: loss(prepared),
        finish,
        same=same,
        ema_decay=ema_decay,
        parts=parts,
    )


def need(folder: Path, files: tuple[str, ...], made_by: str) -> None:
    """Raises:
    InputError: a file is missing in the folder.
    """
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing: {made_by} makes it")
