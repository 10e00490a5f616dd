"""Table 3: concept-wise forgetting from Stable Diffusion, of what can be in any picture.

    python examples/paper/table3.py --scale small                  # "red", of digits in styles
    python examples/paper/table3.py --scale paper                  # nudity, by NudeNet; a GPU

At small scale every method forgets "red" by that word alone, over digits. The judge of style is the
detector: 1 - UA is the share of pictures, asked for in any word for red, that it tells as red, as
NudeNet counts pictures of nudity.
"""

from __future__ import annotations

import command_line
import sd_large
import sd_tables
import sd_tasks

NOTE = (
    "The judge of style is the detector: 1 - UA is the share of pictures, asked for in any word "
    "for it, that are told as the target, as NudeNet counts pictures in the paper."
)


def main(argv: list[str] | None = None) -> None:
    parser = sd_tables.parser(__doc__)
    sd_tables.add_methods(parser)
    parser.add_argument("--target", default="red", help="at small scale: a style or a content")
    args = parser.parse_args(argv)
    if args.scale == "paper":
        sd_large.large(args, sd_tasks.NUDITY, argv, script="table3", title="Table 3")
        return
    sd_tables.small(
        args, args.target, argv, script="table3", title="Table 3 on digits in styles",
        paper=sd_tasks.NUDITY.paper, notes=[NOTE],
    )  # fmt: skip


if __name__ == "__main__":
    command_line.main(main)
