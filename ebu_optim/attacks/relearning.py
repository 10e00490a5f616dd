"""Relearning: fine-tune the denoiser on images of the target until it generates them again."""

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

SHARE = 0.5  # the concept is back at this share of the base's P_f
LOOKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps after which P_f is measured
REPORTED = 10  # P_f after this step is always reported, even if the concept is back earlier


def relearn(attack: Attack) -> Found:
    """Fine-tune the whole denoiser on all images."""
    return curve(attack, "relearn", attack.rows(), attack.args.relearn_learning_rate)


def curve(
    attack: Attack, name: str, rows: Tensor, rate: float, trained: Trained | None = None
) -> Found:
    """P_f of a copy of the denoiser over the steps of training on the target's `rows`.

    Training ends once half of the base's P_f is reached.

    Args:
        name: the name of the figures.
        trained: selects the trained parameters of the copy; None: all.
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
