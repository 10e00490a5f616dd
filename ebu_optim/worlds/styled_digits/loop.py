"""The loop that trains each of the world's models: AdamW, a schedule, checkpoints, an average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.optimization import SchedulerType
from torch import Tensor, nn

from ... import training
from ...errors import InputError
from ...modules import parameter_bytes
from ...training.ema import Ema
from ...training.options import TrainingOptions, at_least, option

Options = TypeVar("Options", bound="LoopOptions")


@dataclass(frozen=True, kw_only=True)
class LoopOptions(TrainingOptions):
    """How a model of the world is trained."""

    train_batch_size: int = option(64, help="of each process")
    learning_rate: float = option(2e-3)
    lr_scheduler: str = option("cosine", choices=[s.value for s in SchedulerType])
    max_train_samples: int | None = option(None, help="only so many digits, for a try")

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
    args: LoopOptions, accelerator: Any, script: str, model: nn.Module,
    loss: Callable[[nn.Module], Tensor], finish: Callable[[Ema | None], None], *,
    same: dict[str, Any] | None = None, ema_decay: float | None = None,
    parts: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Train `model` for --max_train_steps, or go on where that was interrupted; then `finish`.

    Args:
        script: what is trained, for the run's identity and its bar.
        loss: of a batch that it draws from torch's random stream, a 0-d tensor.
        finish: called with the average, while the output folder is held.
        same: what a resumed run must agree in, beside the options.
        ema_decay: of the average of the weights; None keeps none.
        parts: of the result, removed where the run begins anew.
    """
    with training.Run(
        args, accelerator, script, size=parameter_bytes(model), same=same, parts=parts
    ) as run:
        raw = model.train().to(accelerator.device)
        optimizer = torch.optim.AdamW(raw.parameters(), lr=args.learning_rate)
        schedule = training.new_schedule(args, optimizer)
        prepared, optimizer = accelerator.prepare(raw, optimizer)
        ema = None if ema_decay is None else Ema(raw.parameters(), ema_decay, warm=False)
        objects = {"model": raw, "optimizer": optimizer.optimizer, "schedule": schedule}
        begin = run.resume({**objects, "ema": ema} if ema else objects)
        for step in run.steps(begin, script):
            for _ in range(args.gradient_accumulation_steps):
                with accelerator.accumulate(prepared):
                    value = loss(prepared)
                    accelerator.backward(value)
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            schedule.step()
            if ema:
                ema.step(raw.parameters())
            if step % args.logging_steps == 0:
                run.log(step, loss=value.item(), lr=schedule.get_last_lr()[0])
        raw.eval()
        finish(ema)


def need(folder: Path, files: tuple[str, ...], made_by: str) -> None:
    """Raises:
    InputError: a file is missing in the folder.
    """
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing: {made_by} makes it")
