"""Table 2: class-wise forgetting from Stable Diffusion.

    python examples/paper/table2.py --scale small                  # "seven", of digits in styles
    python examples/paper/table2.py --scale paper                  # "cassette player"; a GPU

At small scale every method forgets a digit by its first word, over styles. It is judged in all its
words, also under templates that nothing was trained on, and attacked.
"""

from __future__ import annotations

import command_line
import sd_large
import sd_tasks


def main(argv: list[str] | None = None) -> None:
    sd_large.table(
        __doc__, argv, number=2, target="seven", task=sd_tasks.CASSETTE_PLAYER
    )  # fmt: skip


if __name__ == "__main__":
    command_line.main(main)
