"""Table 2: class-wise forgetting from Stable Diffusion.

    python examples/paper/table2.py --scale small                  # "seven" in digits in styles
    python examples/paper/table2.py --scale paper                  # "cassette player"; a GPU

At small scale every method forgets a digit by its first word, in all styles. The result is judged
with all words of the digit, also in held-out templates, and attacked.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import text_options, text_tables
from ebu_optim.experiments.text_tasks import CASSETTE_PLAYER
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Table2(text_options.Methods):
    target: str = option("seven", help="Target at small scale: a digit or a style.")


def main(args: Table2) -> None:
    text_tables.either(args, args.target, CASSETTE_PLAYER, script="table2", title="Table 2")


if __name__ == "__main__":
    command(main, Table2, __doc__)
