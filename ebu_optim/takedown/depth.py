"""The attacks in a report: how much of the concept is still there, and how easily it returns."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from ..attacks.judges import JudgeOptions
from ..attacks.options import AttackOptions
from ..attacks.run import attack
from ..errors import InputError
from ..text_to_image import pipelines
from ..text_to_image.pipelines import Model

FOLDER = "attacks"


def check(args: Any) -> None:
    """Check that the attacks can open the result.

    Raises:
        InputError: they cannot open the layout that ``--save_as`` names.
    """
    if args.judge and args.save_as == "kohya":
        raise InputError(
            "--judge with --save_as kohya: attacks cannot open kohya's layout; use --save_as lora, "
            "which saves the same weights"
        )


def attacked(args: Any, base: Model, result: Model) -> list[dict[str, Any]]:
    """The values of the rows "before" and "after" by ``--judge``; without a judge, the reason."""
    if args.judge is None:
        why = {"not_computed": "no --judge was given to classify the images"}
        return [{}, dict.fromkeys(("p_f", "inversion", "relearn_steps"), why)]
    own = {f.name: getattr(args, f.name) for f in fields(JudgeOptions)}
    attack(
        AttackOptions(
            **{**own, **{f.name: getattr(result, f.name) for f in fields(Model)}},
            base_model=str(pipelines.fetch(base)),
            forget=args.forget,
            attacks=args.attacks or [],
            forget_templates=None if args.judge == "world" else args.forget_templates,
            paraphrases=args.paraphrases,
            attack_images=args.attack_images,
            target_images=args.attack_images,
            seed=args.seed,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            sample_batch_size=args.sample_batch_size,
            output_dir=args.output_dir / FOLDER,
        )
    )
    found = json.loads((args.output_dir / FOLDER / "attacks.json").read_text(encoding="utf-8"))
    return [found["base"], found["values"]]
