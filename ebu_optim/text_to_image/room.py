"""Check that a run fits on its card, by the memory count, before anything is downloaded."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ..errors import InputError
from . import memory
from .families import Family
from .memory import Cost
from .modules import is_adapter
from .pipelines import Looked
from .prompts import Prompts

GIB = 2**30
SMALLER: dict[str, Any] = {"mixed_precision": "fp16", "gradient_checkpointing": True}
#: Ways to train, from the most memory to the least.
WAYS: dict[str, dict[str, Any]] = {
    "the whole denoiser, float32": {},
    "the whole denoiser, fp16": SMALLER,
    "cross attention, fp16": {"train_modules": "xattn", **SMALLER},
    "LoRA, fp16": {"train_modules": "lora", **SMALLER},
    "LoRA, fp16, over 4 bits": {"train_modules": "lora", "quantize": "nf4", **SMALLER},
}
#: Fewer images at once; those of the report need the whole pipeline and can be left out.
FEWER: tuple[dict[str, Any], ...] = (
    {},
    {"sample_batch_size": 1},
    {"sample_batch_size": 1, "evidence_images": 0},
)


def ways(family: Family) -> dict[str, dict[str, Any]]:
    """The `WAYS` that a family supports, in bfloat16 for a family without float16."""
    there = {
        n: o
        for n, o in WAYS.items()
        if f"--train_modules {o.get('train_modules')}" not in family.lacks
    }
    if "--mixed_precision fp16" not in family.lacks:
        return there
    return {
        name.replace("fp16", "bf16"): options | ({"mixed_precision": "bf16"} if options else {})
        for name, options in there.items()
    }


def check(args: Any, looked: Looked, texts: Prompts, cost: Cost, device: torch.device) -> None:
    """Check that the run fits into the free memory of a CUDA device.

    Raises:
        InputError: the run needs more memory than the card has free. The message names options
            that fit.
    """
    if device.type != "cuda":
        return
    room = torch.cuda.mem_get_info(device)[0]
    if (least := at_least(args, cost)) <= room:
        return
    asked = f"the run needs {least / GIB:.1f} GiB of {device}, which has {room / GIB:.1f} GiB free"
    there = list(ways(looked.family).values())
    if args.train_modules is None:  # the method names what it changes
        there = [way for way in there if "train_modules" not in way]
    for way, fewer in product(there, FEWER):
        options = {**way, **{k: v for k, v in fewer.items() if hasattr(args, k)}}
        smaller = replace(args, **options, **(_result(args, way) if way else {}))
        if at_least(smaller, cost := memory.count(smaller, looked, texts)) <= room:
            said = " ".join(f"--{k} {v}" if v is not True else f"--{k}" for k, v in options.items())
            raise InputError(f"{asked}: give {said}, which needs {cost.peak / GIB:.1f} GiB")
    raise InputError(f"{asked}, and no other options fit: use a larger card, or --cpu")


def at_least(args: Any, cost: Cost) -> int:
    """The least bytes that the run takes.

    Under mixed precision the count of activations is too high, at most by a factor of two."""
    half = 2 if args.mixed_precision in ("fp16", "bf16") else 1
    return max(
        sum(n // half if what == "activations" else n for what, n in rows.items())
        for rows in cost.phases.values()
    )


def _result(args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The --save_as that fits when --train_modules changes between a LoRA and weights."""
    adapter = options.get("train_modules") == "lora"
    return {} if adapter == is_adapter(args) else {"save_as": "lora" if adapter else "changed"}
