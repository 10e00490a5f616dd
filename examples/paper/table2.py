"""Table 2: class-wise forgetting from Stable Diffusion.

    python examples/paper/table2.py --scale small                  # "seven", of digits in styles
    python examples/paper/table2.py --scale paper                  # "cassette player"; a GPU

At small scale every method forgets a digit by its first word, over styles. It is judged in all its
words, also under templates that nothing was trained on, and attacked.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import text_options, text_tables
from ebu_optim.experiments.text_tasks import CASSETTE_PLAYER
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Table2(text_options.Methods):
    target: str = option("seven", help="What is forgotten at small scale: a content or a style.")


def main(args: Table2) -> None:
    text_tables.either(args, args.target, CASSETTE_PLAYER, script="table2", title="Table 2")


if __name__ == "__main__":
    command(main, Table2, __doc__)
