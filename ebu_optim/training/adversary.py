"""The options of adversarial embeddings, for every method and kind of model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..baselines import recipes
from ..diffusion.adversary import Adversary
from ..errors import InputError
from .fields import at_least, option
from .method import needs


@dataclass(frozen=True, kw_only=True)
class AdversaryOptions:
    """Conditions that are trained against the model while it forgets, and are forgotten too."""

    group: ClassVar[str] = "adversarial embeddings"

    adversary_steps: int | None = option(
        None,
        help="Steps of Adam that adversaries take in each step of training, towards "
        "conditions that still generate what is forgotten; these are then forgotten, too. "
        "Default: the method's, which is 0 for most.",
    )
    adversary_restart: int | None = option(
        None,
        help="Steps of training after which an adversary begins anew. Default: the method's, "
        "which is 20 for most.",
    )
    adversaries: int = option(1, help="How many adversaries there are at once.")
    adversary_learning_rate: float = option(
        0.1, help="Learning rate of the adversaries, times the spread of the conditions."
    )
    adversary_weight: float | None = option(
        None,
        help="Weight of the forget loss at the adversaries' conditions, a mean over them. Default: "
        "the method's, which is 0.1 for most.",
    )
    adversary_loss: Literal["pictures", "teacher"] | None = option(
        None,
        help="The loss that adversaries descend: that of denoising images of what is forgotten "
        "(pictures), or the distance to what the frozen model predicts for it (teacher). Default: "
        "the method's, which is pictures for most.",
    )

    def check_adversary(self: Any) -> None:
        """Raises:
        InputError: numbers that cannot be; a method that has nothing to attack; options of
            adversaries where there are none.
        """
        at_least(self, 0, "adversary_steps")
        at_least(self, 1, "adversary_restart", "adversaries")
        rate, weight = self.adversary_learning_rate, self.adversary_weight
        if not 0 < rate < math.inf:
            raise InputError(f"--adversary_learning_rate must be > 0 and finite; got {rate}")
        if weight is not None and not 0 < weight < math.inf:
            raise InputError(f"--adversary_weight must be > 0 and finite; got {weight}")
        if not attacked(self):
            own = [f for f in fields(AdversaryOptions) if f.name != "adversary_steps"]
            if given := [f.name for f in own if getattr(self, f.name) != f.default]:
                raise InputError(f"--{given[0]} needs --adversary_steps, of which there are none")
            return
        if "forget" not in needs(self):
            raise InputError(
                f"--adversary_steps: --method {self.method} has no forget loss that could be taken "
                "at an adversary's embedding"
            )
        if recipes[self.method].embedding:
            raise InputError(
                f"--adversary_steps: --method {self.method} trains the embedding alone, and an "
                "adversary's takes its place"
            )


def defaults(args: Any, method: str) -> dict[str, Any]:
    """What the options of adversaries are where they are not given, those that are None."""
    own = recipes[method].adversary
    steps = own.get("steps") if args.adversary_steps is None else args.adversary_steps
    if not steps:
        return {}
    # the weight: at 1 the neighbours of the forgotten suffered (docs/results.md)
    usual = {"steps": steps, "restart": 20, "weight": 0.1, "loss": "pictures", **own}
    found = {f"adversary_{name}": value for name, value in usual.items()}
    return {name: value for name, value in found.items() if getattr(args, name) is None}


def attacked(args: Any) -> int:
    """How many adversaries there are."""
    return args.adversaries if args.adversary_steps else 0


def passes(args: Any) -> int:
    """Forward and backward passes of a batch in one optimizer step: the two losses, the forget loss
    at every adversary, and the attacks, once for all micro-batches."""
    count = attacked(args)
    micros = args.gradient_accumulation_steps
    return (2 + count) * micros + count * (args.adversary_steps or 0)


def new_adversary(
    args: Any, embedding: Any, forgotten: Any, aims: Any, start: Tensor | None = None
) -> Adversary:
    """As the options say; `start` and `aims` as `Adversary` takes them."""
    return Adversary(
        embedding,
        forgotten,
        aims=aims,
        start=start,
        steps=args.adversary_steps,
        restart=args.adversary_restart,
        count=args.adversaries,
        lr=args.adversary_learning_rate,
        seed=args.seed,
    )
