"""Table 4: EBU's ablations, each in both readings, beside EBU.

    python examples/paper/table4.py --scale small

"w/o L_f", "w/o L_r^c" and "w/o Mitigation" leave a term out of the sum of eq. 13, or one gradient
out of the blend of eq. 11 (alpha 0, 1, and 0.5); "w/o PA" has no penalty, or a full one. At
paper scale with both learning rates of the paper.
"""

from __future__ import annotations

import command_line
import rows
import tables
from worlds import LOSSES


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--regime", choices=("full", "partial"), default="full")
    parser.add_argument("--loss", choices=LOSSES, default="replay", help="to remember by")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args(argv)
    seeds = rows.check_seeds(args.seeds)
    setting = command_line.setting(args, regime=args.regime, loss=args.loss)
    found = []
    for method in ("ebu_added", *rows.ABLATIONS):
        if args.scale == "paper":
            found += [
                tables.row(setting, method, seeds, choice=rows.of_paper(method, lr),
                           name=f"{rows.title(method)}, learning rate {lr:g}")
                for lr in rows.PAPER_RATES
            ]  # fmt: skip
            continue
        choice = rows.tuned(setting, method)
        if method == "ebu_without_alignment":  # no gamma without a penalty
            choice = rows.Choice(choice.learning_rate, {})
        tuning = rows.tuning(setting, method)
        found.append(tables.row(setting, method, seeds, choice=choice, tuning=tuning))
    todo = [*setting.ground, *(run for r in found for run in r.runs)]
    if not command_line.run(args, setting, todo):
        return
    folder = setting.root / f"table4-{args.regime}-{args.loss}"
    tables.write(
        folder, setting, found, paper="table4_ablation_cifar10",
        title=f"Table 4 on {setting.world.title}: {args.regime} replay, remembered by {args.loss}",
        command=command_line.typed("table4", argv),
    )  # fmt: skip
    tables.say(folder)


if __name__ == "__main__":
    command_line.main(main)
