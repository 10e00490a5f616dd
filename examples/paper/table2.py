"""Table 2: class-wise forgetting from Stable Diffusion.

    python examples/paper/table2.py --scale small                  # "seven", of digits in styles
    python examples/paper/table2.py --scale paper                  # "cassette player"; a GPU

At small scale every method forgets a digit by its first word, over styles. It is judged in all its
words, also under templates that nothing was trained on, and attacked.
"""

from __future__ import annotations

import command_line
import sd_large
import sd_tables
import sd_tasks


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__)
    sd_tables.add_methods(parser)
    parser.add_argument("--target", default="seven", help="at small scale: a content or a style")
    args = parser.parse_args(argv)
    if args.scale == "paper":
        sd_large.large(args, sd_tasks.CASSETTE_PLAYER, argv, script="table2", title="Table 2")
        return
    sd_tables.small(
        args, args.target, argv, script="table2", title="Table 2 on digits in styles",
        paper=sd_tasks.CASSETTE_PLAYER.paper,
    )  # fmt: skip


if __name__ == "__main__":
    command_line.main(main)
