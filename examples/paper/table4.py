"""Table 4: EBU and its ablations, each in both variants.

    python examples/paper/table4.py --scale small

"w/o L_f", "w/o L_r^c" and "w/o Mitigation" leave a term out of the sum of eq. 13, or one gradient
out of the blend of eq. 11 (alpha 0, 1, and 0.5). "w/o PA" has no penalty, or a full one. At paper
scale all have both learning rates of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import pages, rows, tables
from ebu_optim.experiments.options import Replayed, Seeds
from ebu_optim.training import command


@dataclass(frozen=True, kw_only=True)
class Table4(Seeds, Replayed):
    pass


def main(args: Table4) -> None:
    setting, found = args.setting(), []
    for method in ("ebu_added", *rows.ABLATIONS):
        if args.scale == "paper":
            found += tables.at_paper_rates(setting, method, args.seeds)
            continue
        choice = rows.tuned(setting, method)
        if method == "ebu_without_alignment":  # no gamma without a penalty
            choice = rows.Choice(choice.learning_rate, {})
        tuning = rows.tuning(setting, method)
        found.append(tables.row(setting, method, args.seeds, choice=choice, tuning=tuning))
    if args.run(setting, [run for r in found for run in r.runs]):
        pages.write(
            setting.root / f"table4-{args.regime}-{args.loss}",
            setting,
            found,
            title=args.said("Table 4", setting.world),
            command=args.command("table4"),
            paper="table4_ablation_cifar10",
        )


if __name__ == "__main__":
    command(main, Table4, __doc__)
