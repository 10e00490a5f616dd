"""What the scripts of the figures share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import rows
import tables
from runs import Run
from torch import Tensor
from worlds import LOSSES, Setting, World


def parse(
    doc: str | None, argv: Sequence[str] | None, scales: dict[str, World] | None = None,
    **options: dict[str, Any],
) -> tuple[Any, Setting]:  # fmt: skip
    """The options that all figures have, and `options` (name -> what add_argument takes)."""
    parser = command_line.parser(doc, scales)
    parser.add_argument("--regime", choices=("full", "partial"), default="full")
    parser.add_argument("--loss", choices=LOSSES, default="replay", help="to remember by")
    parser.add_argument("--seed", type=int, default=1)
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    args = parser.parse_args(argv)
    rows.check_seeds([args.seed])
    return args, command_line.setting(args, regime=args.regime, loss=args.loss)


#: Option of what runs one learning rate at paper scale, where the paper has two.
RATE = {"type": float, "help": "at paper scale; default: {:g}, the paper also has {:g}".format(
    *rows.PAPER_RATES)}  # fmt: skip


def paper_rate(args: Any) -> float | None:
    """The learning rate at paper scale; None elsewhere, where tune.py chose it."""
    if args.scale == "paper":
        return args.learning_rate or rows.PAPER_RATES[0]
    if args.learning_rate is not None:
        raise command_line.InputError(
            f"--learning_rate {args.learning_rate:g} is of --scale paper; at --scale {args.scale} "
            "it is what tune.py chose"
        )
    return None


def run(args: Any, setting: Setting, table: Sequence[tables.Row]) -> bool:
    """Say what it costs, then run what is missing; False after a --dry_run."""
    todo = [*setting.ground, *(run for r in table for run in r.runs)]
    return command_line.run(args, setting, todo)


def write(
    args: Any, setting: Setting, table: Sequence[tables.Row], argv: Sequence[str] | None, *,
    script: str, title: str, plots: Sequence[Any], grids: Sequence[Any], notes: Sequence[str] = (),
) -> Path:  # fmt: skip
    """The report of a figure; the folder that it lies in."""
    rate = f"-lr{args.learning_rate:g}" if getattr(args, "learning_rate", None) else ""
    folder = setting.root / f"{script}-{args.regime}-{args.loss}{rate}"
    tables.write(
        folder, setting, table, plots=plots, grids=grids, notes=notes,
        title=f"{title} on {setting.world.title}: {args.regime} replay, remembered by {args.loss}",
        command=command_line.typed(script, argv),
    )  # fmt: skip
    tables.say(folder)
    return folder


def about(run: Run) -> dict[str, Any]:
    """What unlearn.py wrote about a run, its curve among it."""
    return json.loads((run.commands[0].folder / "unlearn.json").read_text())


def classes(setting: Setting, run: Run) -> tuple[list[int], list[int], list[str]]:
    """The forgotten classes, the kept ones, and the names of all."""
    names = json.loads((setting.base.folder / "classes.json").read_text())["classes"]
    gone = about(run)["forget"]
    return gone, [c for c in range(len(names)) if c not in gone], names


def named(c: int, gone: list[int], names: list[str]) -> str:
    return f"{names[c]} ({'forgotten' if c in gone else 'kept'})"


def samples(setting: Setting, run: Run) -> tuple[Tensor, Tensor]:
    """Images and labels that evaluate.py drew from a run's model."""
    info = json.loads((run.commands[0].folder / "classes.json").read_text())
    return tables.samples(setting, info["hash"])
