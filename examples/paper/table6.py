"""Table 6: class-wise forgetting on CIFAR-10 with every baseline, on three axes.

    python examples/paper/table6.py --scale small                      # digits, two CPU cores
    python examples/paper/table6.py --scale paper                      # GPUs
    python examples/paper/table6.py --scale small --regime partial --loss crossed --seeds 1 2 3 4 5
    python examples/paper/table6.py --scale cifar10-16 --forget bird   # real images, hours on a CPU

Each method has the strength and the learning rate that tune.py chose on seed 0, and 200 steps.
Retrain has the settings of the base's training. At paper scale the methods are the paper's (FT, GA,
SA, SalUn and EBU) with its steps and both of its learning rates. Other methods in --methods have
EBU's steps there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import pages, rows, tables
from ebu_optim.experiments.options import Replayed, Seeds
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Table6(Seeds, Replayed):
    methods: list[str] | None = option(
        None, help="Methods to compare. Default: all; at paper scale the paper's."
    )
    sa_steps: int = option(5000, help="Steps of SA at its published strength; 0 leaves it out.")


def main(args: Table6) -> None:
    paper = args.scale == "paper"
    methods = rows.check_methods(args.methods or (rows.PAPER if paper else rows.ALL))
    setting = args.setting()
    found = tables.class_wise(setting, methods, args.seeds, paper=paper, sa_steps=args.sa_steps)
    of_class = "" if args.forget is None else f"-{args.forget}"
    if args.run(setting, [run for r in found for run in r.runs]):
        pages.write(
            setting.root / f"table6-{args.regime}-{args.loss}{of_class}",
            setting,
            found,
            title=args.said("Table 6", setting.world),
            command=args.command("table6"),
            paper=setting.world.paper if args.forget is None else None,
        )


if __name__ == "__main__":
    command(main, Table6, __doc__)
