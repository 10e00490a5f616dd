"""Relearning: the UNet is fine-tuned on pictures of the target, until it draws it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..metrics.depth import Trained, relearning
from ..metrics.unlearn_steps import crossing
from .found import Found

if TYPE_CHECKING:
    from .attacks import Attack

SHARE = 0.5  # of the base's P_f: so much of it is the concept back
LOOKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps of relearning that are measured
REPORTED = 10  # of them, whether the concept is back before that or not


def relearn(attack: Attack) -> Found:
    """All of the UNet learns, from all pictures."""
    return curve(attack, "relearn", attack.rows(), attack.args.relearn_learning_rate)


def curve(
    attack: Attack, name: str, rows: Tensor, rate: float, trained: Trained | None = None
) -> Found:
    """P_f of a copy of the UNet that learns from the target's `rows`; it ends where half of the
    base's P_f is reached.

    Args:
        name: of the figures.
        trained: what of the copy learns; None: all of it.
    """
    args, model = attack.args, attack.model
    told = model.encode([x.text for x in attack.drawn])
    asked = model.encode([x.text for x in attack.asked])
    level = SHARE * attack.looks["target"].values["p_f"]["value"]
    last = args.relearn_max_steps

    def loss(unet: Any, chosen: Tensor, _: Tensor, g: torch.Generator) -> Tensor:
        latents, numbers = attack.pairs(chosen)
        return attack.denoise(unet, latents, model.told(told[numbers]), g)

    students = relearning(
        model.unet,
        rows,
        0,
        None,
        lr=rate,
        batch_size=args.train_batch_size,
        seed=args.seed,
        loss=loss,
        trained=trained,
    )
    seen, shown = [], {}
    for step, student in enumerate(tqdm(students, name, total=last + 1)):
        if step in LOOKS or step == last:
            score, shown[step] = attack.seen() if not step else attack.look(model, asked, student)
            seen.append({"step": step, **score})
        back = seen[-1]["value"] >= level
        if step == last or (back and step >= min(REPORTED, last)):
            break
    first = crossing([(r["step"], 0.0, r["value"]) for r in seen], level, rising=True)
    values: dict[str, Any] = {
        f"{name}_{REPORTED}": {k: v for k, v in r.items() if k != "step"}
        for r in seen
        if r["step"] == REPORTED
    }
    values[f"{name}_steps"] = {
        "reached": first is not None,
        "steps": None if first is None else first[0],
        "within": seen[-1]["step"],
    }
    kept = sorted({min(REPORTED, last), max(shown)} & set(shown))
    tensors = {f"pictures {name}_{s}": shown[s] for s in kept}
    return Found(values, {"curve": seen, "level": level}, tensors)
