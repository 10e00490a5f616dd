"""The options of a relearner, for every method and kind of model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..diffusion.relearner import Relearner
from ..errors import InputError
from .fields import at_least, option
from .method import needs


@dataclass(frozen=True, kw_only=True)
class RelearnerOptions:
    """Steps towards relearning, from whose end the model forgets too."""

    group: ClassVar[str] = "relearner"

    relearner_steps: int = option(
        0,
        help="Steps of relearning in each micro-batch, after which the forget loss is taken again; "
        "the weights are put back, and its gradient is added. 0 is no relearner.",
    )
    relearner_learning_rate: float | None = option(
        None,
        help="How far such a step moves each weight, down the sign of the gradient of denoising "
        "images of what is forgotten. Default: --learning_rate.",
    )
    relearner_weight: float = option(
        1.0, help="Weight of the forget loss at the weights that were moved."
    )

    def check_relearner(self: Any) -> None:
        """Raises:
        InputError: numbers that cannot be; a method that has nothing to relearn; options of a
            relearner where there is none.
        """
        at_least(self, 0, "relearner_steps")
        for name in ("relearner_learning_rate", "relearner_weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name} must be > 0 and finite; got {value}")
        if not self.relearner_steps:
            for name, default in (("relearner_learning_rate", None), ("relearner_weight", 1.0)):
                if getattr(self, name) != default:
                    raise InputError(f"--{name} needs --relearner_steps, of which there are none")
        elif "forget" not in needs(self):
            raise InputError(
                f"--relearner_steps: --method {self.method} has no forget loss that could be taken "
                "at a relearner's weights"
            )


def passes(args: Any) -> int:
    """Forward and backward passes of a batch in one optimizer step that a relearner adds: its
    steps, and the forget loss after them, for each micro-batch."""
    steps = args.relearner_steps
    return (steps + 1) * args.gradient_accumulation_steps if steps else 0


def new_relearner(args: Any, parameters: Iterable[Tensor]) -> Relearner:
    """As the options say, of the parameters that are trained."""
    rate = args.relearner_learning_rate
    return Relearner(
        parameters,
        steps=args.relearner_steps,
        lr=args.learning_rate if rate is None else rate,
    )
