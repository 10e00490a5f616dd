"""The training loop of the world's models: AdamW, a schedule, checkpoints and an EMA."""

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
    """The options of the training of a model of the world."""

    train_batch_size: int = option(64, help="Batch size of each process.")
    learning_rate: float = option(2e-3, help="Learning rate.")
    lr_scheduler: str = option("cosine", choices=SCHEDULES, help="Schedule of the learning rate.")
    max_train_samples: int | None = option(None, help="Use only this many digits, for a test.")

    def __post_init__(self) -> None:
        self.check_training()
        at_least(self, 1, "max_train_samples")

    def stage(self: Options, name: str, **options: Any) -> Options:
        """The options for one of several models of a command, each with its own folder."""
        return replace(self, output_dir=self.output_dir / name, **options)


def new_accelerator(args: LoopOptions) -> Any:
    accelerator = training.new_accelerator(args)
    if accelerator.num_processes > 1:
        raise InputError(
            f"{accelerator.num_processes} processes were started; these models are too small for "
            "several processes: start one"
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
    """Train `model` for --max_train_steps steps, or resume an interrupted run; then call `finish`.

    Args:
        script: the kind of training, for the run's identity and its progress bar.
        loss: model -> the loss of a batch sampled with torch's global generator, a 0-d tensor.
        finish: called with the EMA, while the output folder is locked.
        same: values in addition to the options that a resumed run must share.
        ema_decay: the decay of the EMA; None keeps no EMA.
        parts: folders of the result, which are removed when the run starts again.
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
    """Check that files exist.

    Raises:
        InputError: a file is missing in the folder.
    """
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing: run {made_by}, which writes it")
