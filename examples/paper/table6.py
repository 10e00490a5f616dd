"""Table 6: class-wise forgetting on CIFAR-10, every baseline, on three axes.

    python examples/paper/table6.py --scale small                      # digits, two CPU cores
    python examples/paper/table6.py --scale paper                      # GPUs
    python examples/paper/table6.py --scale small --regime partial --loss crossed --seeds 1 2 3 4 5

Each method has the strength and learning rate that tune.py chose for it on seed 0, and 200 steps;
Retrain has what the base was trained with. At paper scale the methods are the paper's (FT, GA, SA,
SalUn and EBU) with its steps and both of its learning rates; others that --methods names have 200.
"""

from __future__ import annotations

from typing import Any

import command_line
import rows
import tables
from worlds import LOSSES, Setting, value

METHODS = (*rows.EBU, *rows.RIVALS, *rows.OTHERS)


def table(
    setting: Setting, methods: Any, seeds: list[int], *, paper: bool, sa_steps: int = 5000
) -> list[tables.Row]:
    """The rows. On paper scale the paper contradicts itself on the learning rate: both are run."""
    once = (*rows.OTHERS, "embedding_only")  # their figures decide nothing
    found = []
    for m in methods:
        if m == "retrain":
            found.append(retrain(setting, seeds[0]))
        elif paper:
            found += [
                tables.row(
                    setting, m, seeds, steps=tables.paper_steps(setting.world, m),
                    choice=rows.of_paper(m, lr), name=f"{rows.title(m)}, learning rate {lr:g}",
                )
                for lr in rows.PAPER_RATES
            ]  # fmt: skip
        else:
            found.append(tables.row(setting, m, seeds[:1] if m in once else seeds))
    if sa_steps and not paper:
        found.append(
            tables.row(
                setting, "selective_amnesia", seeds[:1], steps=sa_steps,
                choice=rows.of_paper("selective_amnesia", 1e-4),
                name="SA, published strength", tag="published",
            )
        )  # fmt: skip
    return found


def retrain(setting: Setting, seed: int) -> tables.Row:
    """With the steps, learning rate and batch of the base: 200 steps from random weights draw
    nothing at all."""
    base = setting.world.base
    steps = value(base, "--max_train_steps")
    same = ("--train_batch_size", "--lr_scheduler", "--lr_warmup_steps", "--mixed_precision")
    flags = [x for name in same if name in base for x in (name, value(base, name))]
    return tables.row(
        setting, "retrain", [seed], steps=steps,
        choice=rows.Choice(value(base, "--learning_rate", 2e-4), {}),
        flags=[*flags, "--validation_steps", max(25, steps // 10), "--checkpointing_steps", 1000],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--regime", choices=("full", "partial"), default="full")
    parser.add_argument("--loss", choices=LOSSES, default="replay", help="to remember by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", help="default: all; at paper scale the paper's")
    parser.add_argument("--sa_steps", type=int, default=5000, help="of published SA; 0: without")
    args = parser.parse_args(argv)
    paper = args.scale == "paper"
    methods = rows.check_methods(args.methods or (rows.PAPER if paper else METHODS))
    seeds = rows.check_seeds(args.seeds)
    setting = command_line.setting(args, regime=args.regime, loss=args.loss)
    found = table(setting, methods, seeds, paper=paper, sa_steps=args.sa_steps)
    todo = [*setting.ground, *(run for r in found for run in r.runs)]
    if not command_line.run(args, setting, todo):
        return
    world = setting.world
    folder = setting.root / f"table6-{args.regime}-{args.loss}"
    tables.write(
        folder, setting, found, paper=world.paper,
        title=f"Table 6 on {world.title}: {args.regime} replay, remembered by {args.loss}",
        command=command_line.typed("table6", argv),
    )  # fmt: skip
    tables.say(folder)


if __name__ == "__main__":
    command_line.main(main)
