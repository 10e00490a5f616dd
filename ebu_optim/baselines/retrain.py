"""Retrain, the gold standard: training from random weights without the forgotten class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._compat import compat
from ._recipe import recipe
from .fine_tune import FineTune


class Retrain(FineTune):
    """Retraining: G = g_r, from random weights, on real data without the forgotten class.

    The rule is FT's; only the start differs. Call :func:`reset_weights` once, before the
    first run; a resumed run loads its weights instead.
    """


#: What Retrain learns from.
RECIPE = recipe("Retrain", Retrain, forgets=None, fresh=True)


def reset_weights(model: nn.Module, seed: int, *, compat: str | None = None) -> None:
    """Set the weights of a model to new random values, in place: optimizers keep their parameters.

    A model with ``config`` and ``from_config`` (as in diffusers) is built again. For any other
    model, each module calls its own ``reset_parameters``. The user's random stream is not changed.

    Args:
        model: the model whose weights and buffers are overwritten.
        seed: the seed of the random values.
        compat: "paper" keeps the pretrained weights: the EBU paper's appendix calls that
            "Retraining" (it is FT).

    Raises:
        TypeError: some parameters belong to modules without ``reset_parameters``.
    """
    if _paper(compat):
        return
    kind: Any = type(model)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        if hasattr(model, "config") and hasattr(kind, "from_config"):
            model.load_state_dict(kind.from_config(model.config).state_dict())
            return
        able = [m for m in model.modules() if hasattr(m, "reset_parameters")]
        covered = {id(p) for m in able for p in m.parameters(recurse=False)}
        left = [name for name, p in model.named_parameters() if id(p) not in covered]
        if left:
            raise TypeError(
                f"reset_weights: {', '.join(left[:3])} belong to modules without reset_parameters; "
                "build the model again yourself"
            )
        for module in able:
            module.reset_parameters()  # type: ignore[operator]


_paper = compat  # the function's argument hides the name
