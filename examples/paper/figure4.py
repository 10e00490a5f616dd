"""Figures 4 and 12: the effect of alpha and delta on EBU, both in 0.2, 0.4, 0.6, 0.8.

    python examples/paper/figure4.py --scale small

There are 16 runs on the three axes of the tables, and samples of a forgotten and of a kept class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ebu_optim.experiments import figures, rows, tables
from ebu_optim.experiments.runs import Run
from ebu_optim.experiments.settings import Setting
from ebu_optim.report import comparison
from ebu_optim.training import command, option

VALUES = (0.2, 0.4, 0.6, 0.8)
PLOTS = {
    "p_f_reject": "P_f, reject class",
    "ce_f": "CE_f, nats",
    "ra": "RA",
    "ra_never_replayed": "RA, never replayed",
}
Grid = Mapping[tuple[float, float], tables.Row]


def table(
    setting: Setting, method: str, seed: int, steps: int, paper: float | None = None
) -> dict[tuple[float, float], tables.Row]:
    """The rows by (alpha, delta).

    Args:
        paper: the learning rate at paper scale, or None.
    """
    best = rows.of_paper(method, paper) if paper else rows.tuned(setting, method)
    tuning = "none" if paper else rows.tuning(setting, method)
    found = {}
    for a in VALUES:
        for d in VALUES:
            choice = rows.Choice(best.learning_rate, {**best.options, "alpha": a, "delta": d})
            found[a, d] = tables.row(
                setting,
                method,
                [seed],
                steps=steps,
                choice=choice,
                tuning=tuning,
                name=f"alpha {a}, delta {d}",
            )
    return found


def plots(found: Grid) -> list[dict[str, Any]]:
    """Plots of each measure over alpha, with one line per delta."""
    first = rows.results(next(iter(found.values())).runs[0].folder)
    limits = {r["name"]: r["values"] for r in first[:-1]}
    values = {at: tables.gather(row) for at, row in found.items()}
    inverted = {
        k: f"P_f after {k.split('_')[1]} steps of inversion"
        for k in first[-1]["values"]
        if k.startswith("inversion_")
    }
    charts = []
    for key, label in {**PLOTS, **inverted}.items():
        if key in first[-1]["values"]:
            series = {
                f"delta {d}": [(a, comparison.value(values[a, d][key])) for a in VALUES]
                for d in VALUES
            }
            lines = {n: comparison.value(v[key]) for n, v in limits.items() if key in v}
            charts.append(
                {
                    "title": f"{label.split(',')[0]} over alpha",
                    "x": "alpha",
                    "y": label,
                    "series": series,
                    "limits": lines,
                }
            )
    return charts


def grids(setting: Setting, found: Grid, each: int = 6) -> list[dict[str, Any]]:
    """Grids for a forgotten and a kept class, with alpha as rows and delta as columns."""
    first: Run = found[VALUES[0], VALUES[0]].runs[0]
    gone, kept, names = figures.classes(setting, first)
    drawn = {at: figures.samples(setting, row.runs[0]) for at, row in found.items()}
    return [
        {
            "title": figures.named(c, gone, names),
            "rows": [f"alpha {a}" for a in VALUES],
            "columns": {
                f"delta {d}": torch.stack(
                    [drawn[a, d][0][drawn[a, d][1] == c][:each] for a in VALUES]
                )
                for d in VALUES
            },
        }
        for c in (gone[0], kept[0])
    ]


@dataclass(frozen=True, kw_only=True)
class Figure4(figures.RatedFigure):
    method: Literal[rows.EBU] = option("ebu_added", help="The variant of EBU.")  # type: ignore[valid-type]
    steps: int = option(200, help="Steps of unlearning.")


def main(args: Figure4) -> None:
    setting = args.setting()
    found = table(setting, args.method, args.seed, args.steps, args.paper_rate)
    if args.run_table(setting, list(found.values())):
        args.write(
            setting,
            list(found.values()),
            script="figure4",
            title="Figures 4 and 12",
            plots=plots(found),
            grids=grids(setting, found),
        )


if __name__ == "__main__":
    command(main, Figure4, __doc__)
