"""The loop of unlearning: what happens around each step, whatever the model is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..errors import InputError, NonFiniteError
from .ema import Ema
from .loop import figures, unlearning_step
from .run import Run


@dataclass
class Unlearning:
    """A run that is ready for its steps, by hand or by `step`:

        for step in run.steps():
            run.losses.at(step - 1)
            with run.opt.forget():
                run.accelerator.backward(run.losses.forget())
            with run.opt.remember():
                run.accelerator.backward(run.losses.remember())
            run.optimizer.step()
            run.optimizer.zero_grad()

    Args:
        model, optimizer: as accelerate prepared them; `opt` is the optimizer inside.
        losses: ``at(i)`` chooses the i-th micro-batches; ``forget()`` and ``remember()`` are their
            losses, 0-d tensors.
        done: what checkpoints keep beside the tensors; ``done["seconds"]`` is counted here.
        begin: the steps that were done before.
        look: called with 0 and with each step of which `looks` is true.
        ema: the average of the weights and what it is of.
    """

    args: Any
    run: Run
    accelerator: Accelerator
    model: Any
    opt: Any
    optimizer: Any
    schedule: Any
    losses: Any
    done: dict[str, Any]
    begin: int
    what: str
    look: Callable[[int], None]
    looks: Callable[[int], bool]
    ema: tuple[Ema, Any] | None = None
    said: dict[str, Tensor] = field(default_factory=dict)
    reached: int = 0

    def steps(self) -> Iterator[int]:
        """Numbers of the steps to do, from 1. Around each the schedule, the average, the clock, the
        log, checkpoints, and what is looked at on the way."""
        self.reached = self.begin
        if not self.begin:
            self.look(0)
        for step in self.run.steps(self.begin, f"forgetting {self.what}"):
            start = time.perf_counter()
            yield step
            self.schedule.step()
            if self.ema:
                average, model = self.ema
                average.step(model.parameters())
            self.done["seconds"] += time.perf_counter() - start
            if step % self.args.logging_steps == 0:
                self.run.log(step, **figures(self.said, self.opt))
            if self.looks(step):
                self.look(step)
            self.reached = step

    def check_whole(self) -> None:
        """Before the result is written.

        Raises:
            RuntimeError: steps are left, as after a `break`: it would pass for the whole run.
        """
        if self.reached < self.args.max_train_steps:
            raise RuntimeError(
                f"the steps were left after {self.reached} of {self.args.max_train_steps}, and no "
                "result was written: go through run.steps() to its end, or ask for fewer with "
                "max_train_steps; resume_from_checkpoint='latest' goes on"
            )

    def step(self, step: int) -> None:
        """One step of any method, with its micro-batches.

        Raises:
            InputError: NaN or Inf in a gradient; no weight was changed.
        """
        try:
            self.said = unlearning_step(
                self.accelerator, self.model, self.opt, self.optimizer, self.losses, step
            )
        except NonFiniteError as error:
            raise InputError(
                f"step {step}: {str(error).partition('. Use ')[0]}. The training diverges: give a "
                f"smaller --learning_rate (it is {self.args.learning_rate:g})"
                + ", or --mixed_precision no"
                * (self.args.mixed_precision not in (None, "no"))
            ) from error

    def finish(self) -> None:
        """All steps that are left."""
        for step in self.steps():
            self.step(step)
