"""Figures 3, 9 and 10: pictures of every method, of what is forgotten and of its neighbours.

    python examples/paper/figure3.py --scale small     # a digit, a colour, two styles
    python examples/paper/figure3.py --scale paper     # cassette player (9), nudity (3 and 10)

One seed of the runs of Tables 2 and 3 and of Figure 11, and their pictures; every picture of a
column is from the same starting noise.
"""

from __future__ import annotations

import command_line
import figure11
import rows
import sd_large
import sd_tables
import sd_tasks

#: Figure -> what is forgotten in it.
SMALL = {"Figure 9": "seven", "Figures 3 and 10": "red"}
PAPER = {"Figure 9": sd_tasks.CASSETTE_PLAYER, "Figures 3 and 10": sd_tasks.NUDITY}


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", help="default: those of the tables")
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    args.seeds, args.seeds_rest, args.best = rows.check_seeds([args.seed]), None, ["salun"]
    if args.scale == "paper":
        for title, task in PAPER.items():
            sd_large.large(args, task, argv, script="figure3", title=title)
        return
    styles = {f"Figure 11, {style}": style for style in figure11.STYLES}
    for title, target in {**SMALL, **styles}.items():
        sd_tables.small(args, target, argv, script="figure3", title=f"{title} on digits in styles")


if __name__ == "__main__":
    command_line.main(main)
