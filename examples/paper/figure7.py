"""Figures 7 and 8: samples of forgotten and kept classes for every method.

    python examples/paper/figure7.py --scale small     # the runs of Table 6 in images
    python examples/paper/figure7.py --scale stl10     # Figure 8, of Table 1; or stl10-smoke

All methods start from the same noise; the first row is the model before unlearning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ebu_optim.experiments import figures, pages, rows, settings, tables, worlds
from ebu_optim.training import command, option

STL10 = {"stl10-smoke": worlds.STL10_SMOKE, "stl10": worlds.STL10}


def grid(setting: settings.Setting, found: Sequence[tables.Row], each: int = 4) -> dict[str, Any]:
    run = found[0].runs[0]
    gone, kept, names = figures.classes(setting, run)
    drawn = {"before": pages.samples(setting, figures.about(run)["base_hash"])}
    drawn |= {r.name: figures.samples(setting, r.runs[0]) for r in found}
    return {
        "title": "samples of every method, from the same noise",
        "rows": list(drawn),
        "columns": {
            figures.named(c, gone, names): torch.stack(
                [images[labels == c][:each] for images, labels in drawn.values()]
            )
            for c in [*gone, *kept][:10]
        },
    }


@dataclass(frozen=True, kw_only=True)
class Figure7(figures.Figure):
    scales: ClassVar[Mapping[str, Any]] = {**figures.Figure.scales, **STL10}

    methods: list[str] | None = option(None, help="Methods to show. Default: those of the table.")
    sa_steps: int = option(5000, help="Steps of SA at its published strength; 0 leaves it out.")


def main(args: Figure7) -> None:
    setting = args.setting()
    of_paper = args.scale in ("paper", *STL10)
    methods = args.methods or (rows.PAPER if of_paper else rows.ALL)
    found = tables.class_wise(
        setting,
        rows.check_methods(methods),
        [args.seed],
        paper=args.scale in ("paper", "stl10"),
        sa_steps=0 if setting.world.smoke else args.sa_steps,
    )
    if args.run_table(setting, found):
        args.write(
            setting,
            found,
            script="figure7",
            plots=[],
            grids=[grid(setting, found)],
            title="Figure 8" if args.scale in STL10 else "Figure 7",
        )


if __name__ == "__main__":
    command(main, Figure7, __doc__)
