"""Training runs: options, output folder, loop, resuming, and images to learn from."""

from .._extras import require

require("accelerate", "examples")  # before the parts import it without saying where it comes from

from .command_line import command, exit_on_input_errors, parse
from .fields import as_dict, option
from .loop import figures, fit, new_accelerator, unlearning_step
from .options import TrainingOptions, new_schedule
from .run import Run
from .unlearning import NoSteps, Unlearning

__all__ = [
    "NoSteps",
    "Run",
    "TrainingOptions",
    "Unlearning",
    "as_dict",
    "command",
    "exit_on_input_errors",
    "figures",
    "fit",
    "new_accelerator",
    "new_schedule",
    "option",
    "parse",
    "unlearning_step",
]
