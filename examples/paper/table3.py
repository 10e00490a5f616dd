"""Table 3: forgetting a concept from Stable Diffusion that can be in any image.

    python examples/paper/table3.py --scale small                  # "red" in digits in styles
    python examples/paper/table3.py --scale paper                  # nudity, by NudeNet; a GPU

At small scale every method forgets "red" by that word alone, for all digits. The judge of style is
the detector: 1 - UA is the share of images, of prompts with any word for red, that it recognises
as red, as NudeNet counts images of nudity.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import text_options, text_tables
from ebu_optim.experiments.text_tasks import NUDITY
from ebu_optim.training import command, option

NOTE = (
    "The judge of style is the detector: 1 - UA is the share of images, asked for in any word "
    "for it, in which it sees the target, as NudeNet counts images in the paper."
)


@dataclass(frozen=True, kw_only=True)
class Table3(text_options.Methods):
    target: str = option("red", help="Target at small scale: a digit or a style.")


def main(args: Table3) -> None:
    text_tables.either(args, args.target, NUDITY, script="table3", title="Table 3", notes=[NOTE])


if __name__ == "__main__":
    command(main, Table3, __doc__)
