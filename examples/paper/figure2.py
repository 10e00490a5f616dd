"""Figures 2 and 5: CE_f and CE_r over the seconds and the steps of unlearning.

    python examples/paper/figure2.py --scale small

Every method has 300 steps at the strength that tune.py chose, and SA 5,000 steps at its published
strength; at paper scale the steps are the paper's. The entropies come from the classifier without a
reject class, as in the paper, since a classifier that knows noise is certain about it. P_f comes
from the classifier with a reject class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ebu_optim.experiments import figures, pages, rows, tables
from ebu_optim.experiments.settings import Setting
from ebu_optim.report import comparison
from ebu_optim.training import command, option

METHODS = (
    "ebu_added",
    "selective_amnesia",
    "salun",
    "gradient_ascent",
    "fine_tune",
    "joint",
    "pcgrad",
)
CURVES = {"ce_f": "CE_f, nats", "ce_r": "CE_r, nats", "p_f": "P_f, reject class"}


def table(
    setting: Setting, seed: int, *, paper: float | None, steps: int, sa_steps: int
) -> list[tables.Row]:
    """The rows of the methods.

    Args:
        paper: the learning rate at paper scale, or None.
    """

    def row(method: str, steps: int, **options: Any) -> tables.Row:
        return tables.row(
            setting,
            method,
            [seed],
            steps=steps,
            options={
                "entropy_classifier": setting.judge.folder,
                "validation_steps": max(1, min(10, steps), steps // 100),
            },
            **options,
        )

    if paper:
        return [
            row(m, tables.paper_steps(setting.world, m), choice=rows.of_paper(m, paper))
            for m in METHODS
        ]
    found = [row(m, steps) for m in METHODS]
    if sa_steps:
        found.append(
            row(
                "selective_amnesia",
                sa_steps,
                choice=rows.of_paper("selective_amnesia", 1e-4),
                tag="published",
                name="SA, published strength",
            )
        )
    return found


def plots(found: Sequence[tables.Row]) -> list[dict[str, Any]]:
    """Plots of each measure over seconds and over steps, on log scales.

    The values at step 0 are the limit "base model"."""
    run = found[0].runs[0]
    noise = {k: comparison.value(v) for k, v in rows.results(run.folder)[1]["values"].items()}
    noise["p_f"] = figures.about(run)["noise_p_f"]
    charts = []
    for key, label in CURVES.items():
        for x, unit in (("seconds", "seconds of unlearning"), ("step", "steps")):
            series = {
                r.name: [(p[x], p[key]) for p in pages.curve(r.runs[0]) if p[x] > 0] for r in found
            }
            limits = {"base model": pages.curve(run)[0][key], "noise": noise[key]}
            charts.append(
                {
                    "title": f"{label.split(',')[0]} over {x}",
                    "x": unit,
                    "y": label,
                    "x_scale": "log",
                    "series": series,
                    "limits": limits,
                }
            )
    return charts


@dataclass(frozen=True, kw_only=True)
class Figure2(figures.RatedFigure):
    steps: int = option(300, help="Steps of every method; ignored at paper scale.")
    sa_steps: int = option(5000, help="Steps of SA at its published strength; 0 leaves it out.")


def main(args: Figure2) -> None:
    setting = args.setting()
    found = table(
        setting, args.seed, paper=args.paper_rate, steps=args.steps, sa_steps=args.sa_steps
    )
    if not args.run_table(setting, found):
        return
    args.write(
        setting,
        found,
        script="figure2",
        title="Figures 2 and 5",
        plots=plots(found),
        grids=[pages.pictures(setting, found, 10)],
        notes=[
            "Seconds are of the unlearning loop alone, with whatever else ran on the machine; "
            "the Fisher over all weights that SA takes from prepare.py is not counted. SalUn's "
            "mask is made before the loop, and is not counted either."
        ],
    )


if __name__ == "__main__":
    command(main, Figure2, __doc__)
