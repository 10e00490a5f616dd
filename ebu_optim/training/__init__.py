"""How a run goes: options, output folder, loop, resuming; images to learn from."""

from .loop import figures, new_accelerator, new_schedule, unlearning_step
from .options import add_arguments, check, exit_on_input_errors
from .run import Run

__all__ = [
    "Run",
    "add_arguments",
    "check",
    "exit_on_input_errors",
    "figures",
    "new_accelerator",
    "new_schedule",
    "unlearning_step",
]
