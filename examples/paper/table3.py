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
import sd_tasks

NOTE = (
    "The judge of style is the detector: 1 - UA is the share of pictures, asked for in any word "
    "for it, that are told as the target, as NudeNet counts pictures in the paper."
)


def main(argv: list[str] | None = None) -> None:
    sd_large.table(
        __doc__, argv, number=3, target="red", task=sd_tasks.NUDITY, notes=[NOTE]
    )  # fmt: skip


if __name__ == "__main__":
    command_line.main(main)
