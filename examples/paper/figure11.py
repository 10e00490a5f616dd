"""Figure 11: forgetting styles.

    python examples/paper/figure11.py --scale small      # "outline", then "halftone"
    python examples/paper/figure11.py --scale paper      # Kelly McKernan, Thomas Kinkade; a GPU

A report for each, with the same columns as Tables 2 and 3; at paper scale with the LPIPS distance
to what the base draws, for the artist and for others.
"""

from __future__ import annotations

import command_line
import sd_large
import sd_tables
import sd_tasks

STYLES = ("outline", "halftone")


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__)
    sd_tables.add_methods(parser)
    parser.add_argument("--targets", nargs="+", help=f"default: {', '.join(STYLES)}; at paper scale"
                        f" artists: {', '.join(sd_tasks.ARTISTS[:2])}")  # fmt: skip
    args = parser.parse_args(argv)
    if args.scale == "paper":
        for name in args.targets or sd_tasks.ARTISTS[:2]:
            task = sd_tasks.artist(name)
            sd_large.large(args, task, argv, script="figure11", title="Figure 11")
        return
    for style in args.targets or STYLES:
        sd_tables.small(args, style, argv, script="figure11", title="Figure 11 on digits in styles")


if __name__ == "__main__":
    command_line.main(main)
