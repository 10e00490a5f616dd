"""The accelerator, the schedule and one step: what a training loop is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler

from ..errors import InputError


def new_accelerator(args: Any) -> Accelerator:
    reports = None if args.report_to == "none" else args.report_to
    available = [str(t) for t in get_available_trackers()]
    if reports not in (None, "all") and reports not in available:
        # accelerate itself would drop it without a word
        raise InputError(
            f"--report_to {reports}: not installed; there is {', '.join(available) or 'nothing'}"
        )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=reports,
        project_config=ProjectConfiguration(
            str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
        # the main process may make sets for hours while the others wait
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
        # several processes without a GPU would each train alone, and nobody would say so
        cpu=args.cpu
        or not any(m.is_available() for m in (torch.cuda, torch.xpu, torch.backends.mps)),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes it, scales nothing, and the first Linear layer fails
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU give bf16, or no")
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise InputError(f"{asked} processes were started, accelerate joined them not: give --cpu")
    set_seed(args.seed)  # the same weights everywhere; Run seeds the draws of each process
    return accelerator


def new_schedule(args: Any, optimizer: Any) -> Any:
    """Stepped once an optimizer step, by hand: it is not given to accelerate."""
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )  # fmt: skip


def unlearning_step(
    accelerator: Accelerator, model: Any, opt: Any, optimizer: Any, losses: Any, step: int
) -> dict[str, torch.Tensor]:
    """One step of any method, with its micro-batches; the last micro-batch's losses.

    Args:
        model, optimizer: as accelerate prepared them; `opt` is the optimizer inside.
        losses: ``at(i)`` chooses the i-th micro-batches, ``forget()`` and ``remember()`` are
            their losses.
        step: from 1.
    """
    said = {}
    micros = accelerator.gradient_accumulation_steps
    for micro in range(micros):
        losses.at((step - 1) * micros + micro)
        with accelerator.accumulate(model):
            for name in opt.needs:
                with getattr(opt, name)():
                    loss = getattr(losses, name)()
                    accelerator.backward(loss)
                    said[f"loss_{name}"] = loss.detach()
            optimizer.step()
            optimizer.zero_grad()
    return said


def figures(said: Mapping[str, torch.Tensor], opt: Any) -> dict[str, float]:
    """The losses of a step and the optimizer's own figures, for `Run.log`."""
    stats = {k: v for k, v in opt.stats.items() if isinstance(v, (int, float))}
    return {**{k: v.item() for k, v in said.items()}, **stats}
