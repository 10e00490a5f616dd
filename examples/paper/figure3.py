"""Figures 3, 9 and 10: images of the forgotten concept and its neighbours, for every method.

    python examples/paper/figure3.py --scale small     # a digit, a colour, two styles
    python examples/paper/figure3.py --scale paper     # cassette player (9), nudity (3 and 10)

These are the images of one seed of the runs of Tables 2 and 3 and of Figure 11. All methods start
from the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import rows, text_options, text_tables
from ebu_optim.experiments.text_tasks import CASSETTE_PLAYER, NUDITY, STYLES
from ebu_optim.training import command, option

#: Figure -> the target in it.
SMALL = {
    "Figure 9": "seven",
    "Figures 3 and 10": "red",
    **{f"Figure 11, {style}": style for style in STYLES},
}
PAPER = {"Figure 9": CASSETTE_PLAYER, "Figures 3 and 10": NUDITY}


@dataclass(frozen=True, kw_only=True)
class Figure3(text_options.Chosen):
    seed: int = option(1, help="Seed of unlearning.")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows.check_seeds([self.seed], "--seed")

    def seeds_of(self, method: str) -> list[int]:
        return [self.seed]


def main(args: Figure3) -> None:
    if args.scale == "paper":
        for title, task in PAPER.items():
            text_tables.large(args, task, script="figure3", title=title)
        return
    for title, target in SMALL.items():
        text_tables.small(args, target, script="figure3", title=f"{title} on digits in styles")


if __name__ == "__main__":
    command(main, Figure3, __doc__)
