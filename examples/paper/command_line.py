"""What the scripts of this folder share: their options, and what they say beforehand."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import runs
import worlds

from ebu_optim.errors import InputError

SCALES = {"small": worlds.DIGITS, "cifar16": worlds.CIFAR16, "paper": worlds.CIFAR10}


def parser(doc: str | None, scales: Mapping[str, Any] | None = None, *, data: bool = True) -> Any:
    """Args:
    data: whether the scripts run on images that may be elsewhere.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    found.add_argument("--scale", choices=scales or SCALES, default="small",
                       help=worlds.__doc__ if data else None)  # fmt: skip
    found.add_argument("--output_dir", type=Path, default=Path("outputs/paper"))
    if data:
        found.add_argument(
            "--data", action="append", default=[], metavar="OPTION",
            help='where the same images are, if not on the hub: --data=--parquet --data=FOLDER',
        )  # fmt: skip
    found.add_argument("--workers", type=int, help="runs at a time; default: the cores, or 1 GPU")
    found.add_argument("--dry_run", action="store_true", help="say what it will cost, and stop")
    found.set_defaults(scales=scales or SCALES)
    return found


def setting(args: argparse.Namespace, **options: Any) -> worlds.Setting:
    return worlds.Setting(args.scales[args.scale], args.output_dir, data=args.data, **options)


def run(args: argparse.Namespace, setting: worlds.Setting, todo: Sequence[runs.Run]) -> bool:
    """Say what it costs, then run what is missing; False after a --dry_run."""
    if not announce(args, setting.world, todo):
        return False
    first = next((r for r in todo if r not in setting.ground and not r.done), None)
    if workers(args) > 1 and first and not _base_drawn(setting):
        # it draws and attacks the base model, for all the others
        runs.execute([*setting.ground, first], workers(args))
    runs.execute(todo, workers(args))
    return True


def workers(args: argparse.Namespace) -> int:
    import torch

    found: int = args.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    if found < 1:
        raise InputError(f"--workers must be >= 1; got {found}")
    return found


def announce(args: argparse.Namespace, world: Any, todo: Sequence[runs.Run]) -> bool:
    """Say what it costs; False where that is all that is wanted."""
    print(f"{world.title}: {runs.cost(todo, workers(args), world.basis)}")
    if world.smoke:
        print(f"note: {world.smoke}")
    return not args.dry_run


def _base_drawn(setting: worlds.Setting) -> bool:
    """Whether an evaluation has finished with this base model, and not with one before it."""
    made = setting.base.folder / runs.LAST["train"]
    attacks = (setting.root / "samples").glob("*.json")
    return made.exists() and any(p.stat().st_mtime > made.stat().st_mtime for p in attacks)


def typed(script: str, argv: Sequence[str] | None) -> str:
    """The command that was given, for a report."""
    return shlex.join(["python", f"examples/paper/{script}.py", *(argv or sys.argv[1:])])


def main(script: Callable[[], None]) -> None:
    """Run a script; what the user can put right ends it in a line and status 2."""
    try:
        script()
    except (InputError, runs.Failed) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
