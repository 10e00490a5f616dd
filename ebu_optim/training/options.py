"""The options that every training command has, named as in diffusers' scripts."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import SchedulerType

from ..errors import InputError


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Flags named as in diffusers' scripts; `defaults` are the script's own."""
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, required=True)
    group.add_argument("--overwrite_output_dir", action="store_true", help="of an earlier run")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--train_batch_size", type=int, default=128, help="of each process")
    group.add_argument("--max_train_steps", type=int, default=1000)
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument(
        "--lr_scheduler", default="constant", choices=[s.value for s in SchedulerType]
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="0 does not clip")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1)
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    group.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    group.add_argument("--checkpointing_steps", type=int, default=500)
    group.add_argument("--checkpoints_total_limit", type=int, default=2)
    group.add_argument("--resume_from_checkpoint", help='"latest", or a checkpoint\'s folder')
    group.add_argument("--report_to", default="none", help="tensorboard, wandb, ..., all or none")
    group.add_argument("--logging_dir", default="logs", help="in the output folder")
    group.add_argument("--logging_steps", type=int, default=10)
    parser.set_defaults(**defaults)


def check(args: argparse.Namespace) -> None:
    """Numbers that cannot be; the scripts call it before anything is loaded."""
    for name in ("train_batch_size", "max_train_steps", "gradient_accumulation_steps",
                 "checkpointing_steps", "checkpoints_total_limit", "logging_steps"):  # fmt: skip
        if getattr(args, name) < 1:
            raise InputError(f"--{name} must be >= 1; got {getattr(args, name)}")
    if not args.learning_rate > 0:
        raise InputError(f"--learning_rate must be > 0; got {args.learning_rate}")


def exit_on_input_errors(
    main: Callable[[], None], goes_on: str = "--resume_from_checkpoint latest"
) -> None:
    """Run `main`; what the user can put right is printed in one line, with exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        what = str(error).partition("\n")[0]
        print(
            f"{Path(sys.argv[0]).name}: error: {what}\nA smaller batch takes less, and so do "
            "--gradient_checkpointing and --mixed_precision bf16, where the script has them. "
            f"Where something else filled the memory, {goes_on} goes on",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}. {goes_on} goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {goes_on} goes on", file=sys.stderr)
        sys.exit(130)
