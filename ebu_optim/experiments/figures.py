"""Common parts of the figures of class-conditional models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..training.fields import option
from . import pages, rows
from .options import Replayed
from .runs import Run
from .settings import Setting
from .tables import Row


@dataclass(frozen=True, kw_only=True)
class Figure(Replayed):
    """The options of a figure with one seed.

    Raises:
        InputError: strengths were chosen on this seed.
    """

    seed: int = option(1, help="Seed of unlearning.")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows.check_seeds([self.seed], "--seed")

    def run_table(self, setting: Setting, table: Sequence[Row]) -> bool:
        """Print the cost and make the missing runs; False after a --dry_run."""
        return self.run(setting, [run for r in table for run in r.runs])

    def write(
        self,
        setting: Setting,
        table: Sequence[Row],
        *,
        script: str,
        title: str,
        plots: Sequence[Any],
        grids: Sequence[Any],
        notes: Sequence[str] = (),
    ) -> Path:
        """Write the report and return its folder."""
        rate = getattr(self, "learning_rate", None)
        ending = f"-lr{rate:g}" if rate else ""
        folder = setting.root / f"{script}-{self.regime}-{self.loss}{ending}"
        pages.write(
            folder,
            setting,
            table,
            plots=plots,
            grids=grids,
            notes=notes,
            title=self.said(title, setting.world),
            command=self.command(script),
        )
        return folder


@dataclass(frozen=True, kw_only=True)
class RatedFigure(Figure):
    """A figure with one learning rate at paper scale, where the paper has two.

    Raises:
        InputError: a learning rate is given at another scale.
    """

    learning_rate: float | None = option(
        None,
        help="Learning rate at paper scale. Default: {:g}; the paper also has {:g}.".format(
            *rows.PAPER_RATES
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None and self.scale != "paper":
            raise InputError(
                f"--learning_rate {self.learning_rate:g} needs --scale paper; at --scale "
                f"{self.scale} tune.py chose it: leave it out"
            )

    @property
    def paper_rate(self) -> float | None:
        """The learning rate at paper scale; None at other scales, where tune.py chose it."""
        return (self.learning_rate or rows.PAPER_RATES[0]) if self.scale == "paper" else None


def about(run: Run) -> dict[str, Any]:
    """The content of unlearn.json of a run, with its curve."""
    return json.loads((run.tasks[0].folder / "unlearn.json").read_text())


def classes(setting: Setting, run: Run) -> tuple[list[int], list[int], list[str]]:
    """The forgotten classes, the kept ones, and the names of all."""
    names = json.loads((setting.base.folder / "classes.json").read_text())["classes"]
    gone = about(run)["forget"]
    return gone, [c for c in range(len(names)) if c not in gone], names


def named(c: int, gone: list[int], names: list[str]) -> str:
    return f"{names[c]} ({'forgotten' if c in gone else 'kept'})"


def samples(setting: Setting, run: Run) -> tuple[Tensor, Tensor]:
    """The images that a run's model generated, and their labels."""
    info = json.loads((run.tasks[0].folder / "classes.json").read_text())
    return pages.samples(setting, info["hash"])
