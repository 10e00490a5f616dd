"""relearn_steps: how many steps of fine-tuning on the forget set bring the class back.

Do not confuse it with the paper's RT, which counts the steps of unlearning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .depth import Loss, relearning
from .unlearn_steps import crossing


def relearn_steps(
    model: nn.Module,
    images: Tensor,
    label: int,
    scheduler: Any,
    p_f: Callable[[nn.Module], float],
    *,
    level: float = 0.5,
    every: int = 5,
    max_steps: int = 200,
    lr: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
) -> dict[str, Any]:
    """Count steps of Adam on a copy of the model until P_f is `level` again; higher is deeper.

    Args:
        images: (n, C, H, W) real images of the forgotten class.
        label: its label.
        p_f: returns P_f of a model: sample the forgotten class, with the same starting noise each
            time, and classify.
        every: steps between two measurements. P_f is interpolated linearly between them, so the
            result has this resolution.
        max_steps: when to give up; P_f is measured there too.
        loss: for a model that is not a diffusion model, ``loss(model, images, labels, generator)``
            -> 0-d tensor replaces the denoising loss; `scheduler` may then be None.

    Returns:
        ``steps`` (None: not within `max_steps`), ``reached``, ``within`` (the last step measured)
        and ``curve``, a list of ``{"step", "p_f"}``. 0 steps: the model's P_f is >= `level` from
        the start, so it forgot nothing.
    """
    for name, value in (("every", every), ("max_steps", max_steps)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}")
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], a probability; got {level}")
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "loss": loss}
    curve: list[dict[str, float]] = []
    for step, student in enumerate(relearning(model, images, label, scheduler, **options)):
        if step % every == 0 or step == max_steps:
            curve.append({"step": step, "p_f": float(p_f(student))})
            if curve[-1]["p_f"] >= level or step == max_steps:
                break
    first = crossing([(r["step"], 0.0, r["p_f"]) for r in curve], level, rising=True)
    return {
        "steps": None if first is None else first[0],
        "reached": first is not None,
        "within": curve[-1]["step"],
        "curve": curve,
    }
