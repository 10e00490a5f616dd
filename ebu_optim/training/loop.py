"""The parts of a training loop: the accelerator, the loop itself, and one step of unlearning."""

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
    """Create the Accelerator for the options, and set the seed.

    Raises:
        InputError: the tracker is not installed; the device does not support the precision or
            float64; accelerate did not connect the processes.
    """
    reports = None if args.report_to == "none" else args.report_to
    available = [str(t) for t in get_available_trackers()]
    if reports not in (None, "all") and reports not in available:
        # accelerate itself would silently ignore it
        raise InputError(
            f"--report_to {reports}: this tracker is not installed; installed are: "
            f"{', '.join(available) or 'none'}"
        )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=reports,
        project_config=ProjectConfiguration(
            str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
        ),
        # the other processes may wait for hours while the main process makes sets
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
        # without this, several processes without a GPU would silently train separate models
        cpu=args.cpu
        or not any(m.is_available() for m in (torch.cuda, torch.xpu, torch.backends.mps)),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate accepts it without a scaler, and the first Linear layer fails
        raise InputError("--mixed_precision fp16 needs a GPU; on a CPU give bf16, or no")
    if isinstance(args, MethodOptions) and not has_float64(accelerator.device):
        raise InputError(
            f"the methods need float64, which {accelerator.device} does not support: give --cpu"
        )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise InputError(
            f"{asked} processes were started, but accelerate did not connect them: give --cpu"
        )
    set_seed(args.seed)  # the same weights on all processes; Run seeds each process differently
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
    """Train `model` for --max_train_steps steps, or resume an interrupted run; then call `finish`.

    Args:
        args: a config with `TrainingOptions`.
        script: the kind of training, for the run's identity and its progress bar.
        optimizer: a torch optimizer over the model's parameters.
        loss: (model prepared by accelerate, index i) -> the loss of micro-batch i, a 0-d tensor.
        finish: called by the main process with the EMA, while the output folder is locked.
        same: values in addition to the options that a resumed run must share.
        ema_decay: the decay of the EMA; None keeps no EMA.
        parts: folders of the result, which are removed when the run starts again.
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
    """Take one step of any method, with its micro-batches.

    Args:
        model, optimizer: prepared by accelerate; `opt` is the optimizer without its wrapper.
        losses: ``at(i)`` selects the micro-batches i, ``forget()`` and ``remember()`` return their
            losses.
        step: the number of the step, from 1.

    Returns:
        The losses of the last micro-batch, by name.
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
