"""Figure 11: forgetting styles.

    python examples/paper/figure11.py --scale small      # "outline", then "halftone"
    python examples/paper/figure11.py --scale paper      # Kelly McKernan, Thomas Kinkade; a GPU

Each target has a report with the columns of Tables 2 and 3; at paper scale with the LPIPS distance
to the images of the base, for the artist and for others.
"""

from __future__ import annotations

from dataclasses import dataclass

from ebu_optim.experiments import text_options, text_tables
from ebu_optim.experiments.text_tasks import ARTISTS, STYLES, artist
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Figure11(text_options.Methods):
    targets: list[str] | None = option(
        None,
        help=f"Targets. Default: {', '.join(STYLES)}; at paper scale artists: "
        f"{', '.join(ARTISTS[:2])}.",
    )


def main(args: Figure11) -> None:
    paper = args.scale == "paper"
    for name in args.targets or (ARTISTS[:2] if paper else STYLES):
        task = artist(name)  # the paper has no table for it
        text_tables.either(args, name, task, script="figure11", title="Figure 11")


if __name__ == "__main__":
    command(main, Figure11, __doc__)
