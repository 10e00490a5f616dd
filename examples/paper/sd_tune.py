"""Choose the learning rate and the strength of every method in the world of digits in styles.

    python examples/paper/sd_tune.py --kind content

Each method has six trials on seed 0, on a target that no table reports. The regime, the losses and
the modules are options, as for the tables. The choice with the best score = (1 - P_f) + accuracy on
the kept concepts (never replayed ones if there are any) - the worst drop of one concept + (1 - P_f
after 100 steps of inversion) is written into tuned.json in the output folder. The other scripts
read that file before the published one of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ebu_optim.experiments import rows, tables, text_options, text_results, text_tables, tuning
from ebu_optim.experiments.runs import Run
from ebu_optim.experiments.text_worlds import TextSetting
from ebu_optim.training import command, option

#: The targets of the trials, which are in no table. Both have a near neighbour (eight, red) that a
#: method can damage.
TARGETS = {"content": "three", "style": "blue"}
RATES = (1e-4, 3e-4)
#: For methods without a strength, as many learning rates.
ALONE = ("learning_rate", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3))
GRIDS = {
    **rows.GRIDS,
    "spm": ("anchor_weight", (10.0, 100.0, 1000.0)),
    **dict.fromkeys(("esd", "fine_tune"), ALONE),
}
#: An adapter of rank 1 needs higher learning rates: ten times as high in its paper, thirty here.
ADAPTER = 30


@dataclass(frozen=True, kw_only=True)
class TextTune(text_options.OfWorld):
    kind: Literal["content", "style"] = option("content", help="The kind of target.")
    methods: list[str] = option(list(text_options.METHODS), help="Methods to tune.")
    learning_rates: list[float] = option(
        list(RATES),
        help=f"Learning rates of the trials, for methods with a strength; for SPM they are "
        f"multiplied by {ADAPTER}. Earlier trials on this base count, too.",
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
