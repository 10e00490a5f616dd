"""How a run goes: options, output folder, loop, resuming; images to learn from."""

from .._extras import require

require("accelerate", "examples")  # before the parts import it without saying where it comes from

from .loop import figures, fit, new_accelerator, new_schedule, unlearning_step
from .options import add_arguments, check, exit_on_input_errors
from .run import Run

__all__ = [
    "Run",
    "add_arguments",
    "check",
    "exit_on_input_errors",
    "figures",
    "fit",
    "new_accelerator",
    "new_schedule",
    "unlearning_step",
]
