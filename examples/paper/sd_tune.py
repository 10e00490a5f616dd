"""Choose every method's learning rate and strength in the world of digits in styles, by six trials
on seed 0 and on a target that no table reports.

    python examples/paper/sd_tune.py --kind content

For a regime, losses and modules as the tables have them. The choice with the best score = (1 - P_f)
+ accuracy on what is kept, never replayed where that is told apart, - the worst drop of one concept
+ (1 - P_f after 100 steps of inversion) goes into tuned.json, which the other scripts read.
"""

from __future__ import annotations

from collections.abc import Sequence

import command_line
import rows
import sd_results
import sd_tables
import tune

#: What is forgotten in the trials: in no table. Both have a near neighbour (eight, red), which a
#: method can lose.
TARGETS = {"content": "three", "style": "blue"}
RATES = (1e-4, 3e-4)
#: Where there is no strength, as many learning rates.
ALONE = ("learning_rate", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3))
GRIDS = {
    **rows.GRIDS,
    "spm": ("anchor_weight", (10.0, 100.0, 1000.0)),
    **dict.fromkeys(("esd", "fine_tune"), ALONE),
}
#: An adapter of rank 1 learns at other rates: published, ten times the others', here thirty.
ADAPTER = 30


def rates(method: str, given: Sequence[float]) -> list[float]:
    return [float(f"{r * (ADAPTER if method == 'spm' else 1):g}") for r in given]


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__, small_alone=True)
    parser.add_argument("--kind", choices=TARGETS, default="content")
    parser.add_argument("--methods", nargs="+", default=list(sd_tables.METHODS))
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=list(RATES),
        help=f"of methods with a strength, SPM {ADAPTER} times these; earlier trials on this base "
        "count",
    )  # fmt: skip
    args = parser.parse_args(argv)
    methods = sd_tables.check_methods(args.methods)
    for method in methods:
        if method not in GRIDS:
            raise command_line.InputError(f"--methods {method} has no strength to tune")
    setting = sd_tables.setting(args, TARGETS[args.kind])
    found = {
        (m, c.name): (c, sd_tables.trial(args, setting, m, c))
        for m in methods
        for c in rows.trials(m, rates(m, args.learning_rates), GRIDS)
    }
    todo = [*setting.ground, *(run for _, run in found.values())]
    if sd_tables.run(args, setting, todo):
        tune.record(setting, methods, found, sd_results.score)


if __name__ == "__main__":
    command_line.main(main)
