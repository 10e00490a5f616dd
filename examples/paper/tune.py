"""Choose the strength and the learning rate of every method, by six trials on seed 0.

    python examples/paper/tune.py --scale small --loss crossed

Seed 0 is not reported. More --learning_rates give more trials. The trials use partial replay, where
methods differ. The choice with the best score = (1 - P_f) + accuracy on the classes that were never
replayed + (1 - P_f after 100 steps of inversion) is written into tuned.json in the output folder.
The other scripts read that file before the published one of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import rows, tuning
from ebu_optim.experiments.options import Forgetting
from ebu_optim.experiments.settings import Loss
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Tune(Forgetting):
    loss: Loss = option("replay", help="Remember loss; relabel is also a forget loss.")
    methods: list[str] = option([*rows.EBU, *rows.RIVALS], help="Methods to tune.")
    learning_rates: list[float] = option(
        list(rows.RATES),
        help="Learning rates of the trials, for methods with a strength. Earlier trials on the "
        "same base count, too.",
    )


def main(args: Tune) -> None:
    methods = tuning.check_methods(rows.check_methods(args.methods), rows.GRIDS)
    setting = args.setting(regime="partial", loss=args.loss)
    found = {
        (method, choice.name): (
            choice,
            setting.run(
                f"{method}-partial-{args.loss}-{choice.name}",
                method,
                seed=0,
                options=choice.given,
                trial=True,
            ),
        )
        for method in methods
        for choice in rows.trials(method, args.learning_rates)
    }
    if args.run(setting, [run for _, run in found.values()]):
        tuning.record(setting, methods, found, rows.score)


if __name__ == "__main__":
    command(main, Tune, __doc__)
