"""Choose every method's learning rate and strength in the world of digits in styles, by six trials
on seed 0 and on a target that no table reports.

    python examples/paper/sd_tune.py --kind content

For a regime, losses and modules as the tables have them. The choice with the best score = (1 - P_f)
+ accuracy on what is kept, never replayed where that is told apart, - the worst drop of one concept
+ (1 - P_f after 100 steps of inversion) goes into tuned.json of the output folder, which the other
scripts read before the published one of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ebu_optim.experiments import rows, tables, text_options, text_results, text_tables, tuning
from ebu_optim.experiments.runs import Run
from ebu_optim.experiments.text_worlds import TextSetting
from ebu_optim.training import command, option

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


@dataclass(frozen=True, kw_only=True)
class TextTune(text_options.OfWorld):
    kind: Literal["content", "style"] = option(
        "content", help="The kind of target that is tuned for."
    )
    methods: list[str] = option(list(text_options.METHODS), help="Methods to tune.")
    learning_rates: list[float] = option(
        list(RATES),
        help=f"Learning rates of the trials, for methods with a strength; SPM has {ADAPTER} times "
        "these. Earlier trials on this base count, too.",
    )


def rates(method: str, given: Sequence[float]) -> list[float]:
    return [float(f"{r * (ADAPTER if method == 'spm' else 1):g}") for r in given]


def trial(args: TextTune, setting: TextSetting, method: str, choice: rows.Choice) -> Run:
    steps = args.steps or text_tables.STEPS
    chosen = text_tables.tag(setting, choice, setting.trains(method))
    name = tables.label(setting, method, chosen, steps)
    return setting.run(name, method, seed=0, steps=steps, options=choice.given, trial=True)


def main(args: TextTune) -> None:
    methods = tuning.check_methods(text_options.check_methods(args.methods), GRIDS)
    setting = args.setting(TARGETS[args.kind])
    found = {
        (m, c.name): (c, trial(args, setting, m, c))
        for m in methods
        for c in rows.trials(m, rates(m, args.learning_rates), GRIDS)
    }
    if args.run(setting, [*setting.ground, *(run for _, run in found.values())]):
        tuning.record(setting, methods, found, text_results.score)


if __name__ == "__main__":
    command(main, TextTune, __doc__)
