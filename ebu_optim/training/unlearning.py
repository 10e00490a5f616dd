"""The loop of unlearning, for any model: what happens around each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from ..errors import InputError, NonFiniteError
from .ema import Ema
from .loop import figures, unlearning_step
from .run import Run


class NoSteps(NamedTuple):
    """In the place of `Unlearning` for an edit in closed form, which is made already."""

    accelerator: Accelerator

    def steps(self) -> Iterator[int]:
        return iter(())

    def finish(self) -> None:
        pass


@dataclass
class Unlearning:
    """A run that is ready for its steps, which you take yourself or with `step`:

        for step in run.steps():
            run.losses.at(step - 1)
            with run.opt.forget():
                run.accelerator.backward(run.losses.forget())
            with run.opt.remember():
                run.accelerator.backward(run.losses.remember())
            run.optimizer.step()
            run.optimizer.zero_grad()

    Args:
        model, optimizer: prepared by accelerate; `opt` is the optimizer without its wrapper.
        losses: ``at(i)`` selects the micro-batches i; ``forget()`` and ``remember()`` return their
            losses, 0-d tensors.
        done: what checkpoints keep in addition to tensors; ``done["seconds"]`` is counted here.
        begin: the number of steps that were done before.
        what: the concepts to forget, for the progress bar.
        look: called with 0 and with each step for which `looks` is true.
        ema: the EMA of the weights and its model.
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
        """Yield the numbers of the steps to do, from 1.

        After each step this updates the schedule, the EMA, the time, the log and the checkpoints,
        and calls `look`."""
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
        """Check that all steps were taken, before the result is written.

        Raises:
            RuntimeError: steps are left, for example after a `break`. The result would look like
                that of the whole run.
        """
        if self.reached < self.args.max_train_steps:
            raise RuntimeError(
                f"the loop ended after {self.reached} of {self.args.max_train_steps} steps, and no "
                "result was written: iterate over run.steps() to its end, or ask for fewer steps "
                "with max_train_steps; resume_from_checkpoint='latest' continues"
            )

    def step(self, step: int) -> None:
        """Take one step of any method, with its micro-batches.

        Raises:
            InputError: a gradient has NaN or Inf. No weight was changed.
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
        """Take all remaining steps."""
        for step in self.steps():
            self.step(step)
