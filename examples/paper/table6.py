"""Table 6: class-wise forgetting on CIFAR-10, every baseline, on three axes.

    python examples/paper/table6.py --scale small                      # digits, two CPU cores
    python examples/paper/table6.py --scale paper                      # GPUs
    python examples/paper/table6.py --scale small --regime partial --loss crossed --seeds 1 2 3 4 5

Each method has the strength and learning rate that tune.py chose for it on seed 0, and 200 steps.
At paper scale FT, GA, SA, SalUn and EBU have the paper's steps and learning rate instead.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import command_line
import rows
import tables
from worlds import LOSSES, Setting

#: At paper scale: steps as the paper's column RT has them.
PAPER_STEPS = {"fine_tune": 2000, "gradient_ascent": 2000, "selective_amnesia": 20000,
               "salun": 4000, "ebu_added": 200}  # fmt: skip
#: SA with the lambda = 10 of its paper, on a Fisher of the mean over timesteps instead of the sum.
SA_PUBLISHED = rows.Choice(1e-4, {"lam": 1e7})
METHODS = (*rows.EBU, *rows.RIVALS, *rows.OTHERS)


def table(
    setting: Setting, methods: Any, seeds: list[int], *, paper: bool, sa_steps: int = 5000
) -> list[tables.Row]:
    """The rows. On paper scale the paper contradicts itself on the learning rate: both are run."""
    if paper:
        return [
            tables.row(
                setting, m, seeds, steps=PAPER_STEPS[m], choice=_paper_choice(m, lr),
                name=f"{rows.title(m)}, learning rate {lr:g}",
            )
            for m in PAPER_STEPS
            for lr in (1e-5, 1e-4)
        ]  # fmt: skip
    once = (*rows.OTHERS, "embedding_only")  # their figures decide nothing
    found = [tables.row(setting, m, seeds[:1] if m in once else seeds) for m in methods]
    if sa_steps:
        found.append(
            tables.row(
                setting, "selective_amnesia", seeds[:1], steps=sa_steps, choice=SA_PUBLISHED,
                name="SA, published strength", tag="published",
            )
        )  # fmt: skip
    return found


def _paper_choice(method: str, lr: float) -> rows.Choice:
    return rows.Choice(lr, SA_PUBLISHED.options if method == "selective_amnesia" else {})


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--regime", choices=("full", "partial"), default="full")
    parser.add_argument("--loss", choices=LOSSES, default="replay", help="to remember by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sa_steps", type=int, default=5000, help="of published SA; 0: without")
    args = parser.parse_args(argv)
    rows.check_methods(args.methods)
    setting = command_line.setting(args, regime=args.regime, loss=args.loss)
    found = table(
        setting, args.methods, args.seeds, paper=args.scale == "paper", sa_steps=args.sa_steps
    )
    todo = [*setting.ground, *(run for r in found for run in r.runs)]
    if not command_line.run(args, setting, todo):
        return
    world = setting.world
    folder = setting.root / f"table6-{args.regime}-{args.loss}"
    tables.write(
        folder, setting, found, paper=world.paper,
        title=f"Table 6 on {world.title}: {args.regime} replay, remembered by {args.loss}",
        command=shlex.join(["python", "examples/paper/table6.py", *(argv or sys.argv[1:])]),
    )  # fmt: skip
    tables.say(folder)


if __name__ == "__main__":
    command_line.main(main)
