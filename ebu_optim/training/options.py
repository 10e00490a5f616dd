"""The options of every training command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import SchedulerType, get_scheduler

from ..errors import InputError
from .fields import at_least, option

#: The schedules of diffusers, except for the one that needs further rules.
SCHEDULES = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of every training command, named as in diffusers' scripts."""

    group: ClassVar[str] = "training"

    output_dir: Path = option(help="Folder for everything that the run writes.")
    overwrite_output_dir: bool = option(False, help="Replace the earlier run in the output folder.")
    seed: int = option(0, help="Seed of all random numbers.")
    train_batch_size: int = option(128, help="Batch size of each process.")
    max_train_steps: int = option(1000, help="Steps of the optimizer.")
    learning_rate: float = option(1e-4, help="Learning rate.")
    lr_scheduler: str = option("constant", choices=SCHEDULES, help="Schedule of the learning rate.")
    lr_warmup_steps: int = option(0, help="Steps at the start over which the learning rate rises.")
    max_grad_norm: float = option(1.0, help="Clip the gradient to this norm; 0 does not clip.")
    gradient_accumulation_steps: int = option(1, help="Micro-batches of one step.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        help="Precision of the forward and backward passes. Default: accelerate's setting, which "
        "is float32 unless you configured it.",
    )
    cpu: bool = option(False, help="Use the CPU even where there is a GPU.")
    checkpointing_steps: int = option(500, help="Save a checkpoint every this many steps.")
    checkpoints_total_limit: int = option(2, help="Keep this many checkpoints.")
    resume_from_checkpoint: str | None = option(
        None, help='Resume from "latest", or from the folder of a checkpoint.'
    )
    report_to: str = option(
        "none", help="Tracker for losses and figures: tensorboard, wandb, ..., all, or none."
    )
    logging_dir: str = option("logs", help="Folder of the tracker's logs, in the output folder.")
    logging_steps: int = option(10, help="Log every this many steps.")

    def check_training(self, steps: int = 1) -> None:
        """Check the values.

        Args:
            steps: the least number of steps.

        Raises:
            InputError: a value is out of range.
        """
        at_least(
            self,
            1,
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        )
        at_least(self, steps, "max_train_steps")
        at_least(self, 0, "lr_warmup_steps", "seed")
        if self.seed >= 2**32:
            raise InputError(f"--seed must be < {2**32}, numpy's limit; got {self.seed}")
        rate = self.learning_rate
        if rate is None:
            return
        if not 0 < rate < math.inf:
            raise InputError(f"--learning_rate must be > 0 and finite; got {rate}")
        try:
            new_schedule(self, torch.optim.SGD([torch.zeros(1)], lr=rate))
        except ValueError as error:
            raise InputError(f"--lr_scheduler {self.lr_scheduler}: {error}") from error


def new_schedule(args: Any, optimizer: Any) -> Any:
    """The learning rate schedule.

    The loop steps it once per optimizer step; accelerate does not prepare it."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps or 1,
    )


def ddim_takes(config: Any, scheduler: Any, *names: str) -> None:
    """Check numbers of DDIM steps.

    Raises:
        InputError: an option of these names is more than DDIM supports on the model's schedule.
    """
    sampler = DDIMScheduler.from_config(scheduler.config)
    total = sampler.config.num_train_timesteps

    def fits(steps: int) -> bool:
        sampler.set_timesteps(steps)  # SD's steps_offset makes 1000 begin at t = 1000
        return int(sampler.timesteps.max()) < total

    for name in names:
        if (steps := getattr(config, name)) > total or not fits(steps):
            most = next((n for n in range(min(steps, total), 0, -1) if fits(n)), 0)
            raise InputError(f"--{name} must be <= {most}, the model's; got {steps}")
