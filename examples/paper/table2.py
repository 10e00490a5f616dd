"""Table 2: class-wise forgetting from Stable Diffusion; with Figure 9's pictures.

    python examples/paper/table2.py --scale small                  # "seven", of digits in styles
    python examples/paper/table2.py --scale paper                  # "cassette player", a GPU

At small scale every method forgets a digit by its first word, over styles, and is judged in all
its words, under templates that nothing was trained on, and attacked.
"""

from __future__ import annotations

import sd_tables


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__)
    sd_tables.add_methods(parser)
    parser.add_argument("--target", default="seven", help="at small scale: a content")
    args = parser.parse_args(argv)
    sd_tables.small(
        args, args.target, argv, script="table2", title="Table 2 on digits in styles",
        paper="table2_imagenette_sd_cassette_player",
    )  # fmt: skip


if __name__ == "__main__":
    sd_tables.command_line.main(main)
