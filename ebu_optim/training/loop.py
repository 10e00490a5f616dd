"""The accelerator, the schedule and one step: what a training loop is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.contract import has_float64
from ..modules import parameter_bytes
from .ema import Ema
from .method import MethodOptions
from .options import new_schedule
from .run import Run


def new_accelerator(args: Any) -> Accelerator:
    """Accelerate as the options ask for it, with the seed set.

    Raises:
        InputError: a tracker that is not installed, a precision or a device that cannot train, or
            processes that accelerate did not connect.
    """
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
        # without this, several processes without a GPU would each train alone, in silence
        cpu=args.cpu
        or not any(m.is_available() for m in (torch.cuda, torch.xpu, torch.backends.mps)),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate takes it, scales nothing, and the first Linear layer fails
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU give bf16, or no")
    if isinstance(args, MethodOptions) and not has_float64(accelerator.device):
        raise InputError(
            f"the methods need float64, which {accelerator.device} does not have: give --cpu"
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise InputError(
            f"{asked} processes were started, but accelerate did not connect them: give --cpu"
        )
    set_seed(args.seed)  # the same weights everywhere; Run seeds the draws of each process
    return accelerator


def fit(
    args: Any,
    accelerator: Accelerator,
    script: str,
    model: nn.Module,
    optimizer: Any,
    loss: Callable[[nn.Module, int], Tensor],
    finish: Callable[[Ema | None], None],
    *,
    same: Mapping[str, Any] | None = None,
    ema_decay: float | None = None,
    parts: Sequence[str] = (),
) -> None:
    """Train `model` for --max_train_steps, or go on where that was interrupted; then `finish`.

    Args:
        args: a config with `TrainingOptions`.
        script: what is trained, for the run's identity and its bar.
        optimizer: a torch optimizer over the model's parameters.
        loss: of the i-th micro-batch, a 0-d tensor, by the model as accelerate prepared it.
        finish: called by the main process with the average, while the output folder is held.
        same: what a resumed run must agree in, beside the options.
        ema_decay: of the average of the weights; None keeps none.
        parts: folders of the result, removed where the run begins anew.
    """
    size, micros = parameter_bytes(model), args.gradient_accumulation_steps
    with Run(args, accelerator, script, size=size, same=same, parts=parts) as run:
        schedule = new_schedule(args, optimizer)
        prepared, wrapped = accelerator.prepare(model.train(), optimizer)
        ema = None if ema_decay is None else Ema(model.parameters(), ema_decay, warm=False)
        objects = {"model": model, "optimizer": optimizer, "schedule": schedule}
        begin = run.resume({**objects, "ema": ema} if ema else objects)
        accelerator.print(
            f"{size / 4e6:.2f} M parameters; {accelerator.num_processes} process(es) on "
            f"{accelerator.device}"
        )
        for step in run.steps(begin, script):
            for micro in range(micros):
                with accelerator.accumulate(prepared):
                    value = loss(prepared, (step - 1) * micros + micro)
                    accelerator.backward(value)
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(prepared.parameters(), args.max_grad_norm)
                    wrapped.step()
                    wrapped.zero_grad()
            schedule.step()
            if ema:
                ema.step(model.parameters())
            if step % args.logging_steps == 0:
                run.log(step, loss=value.item(), lr=schedule.get_last_lr()[0])
        model.eval()
        if accelerator.is_main_process:
            finish(ema)
        accelerator.wait_for_everyone()


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
