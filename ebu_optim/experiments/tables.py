"""The rows of a table: a method with its strength, and a run for every seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..report.comparison import rows_over_seeds
from . import rows
from .runs import Options, Run
from .settings import Setting
from .worlds import World

PAPER = Path(__file__).with_name("paper_tables.json")


class Row(NamedTuple):
    """A row of a table: its name, and one run per seed."""

    name: str
    runs: tuple[Run, ...]
    steps: int
    choice: rows.Choice
    tuning: str  # how the choice was made

    @property
    def seeds(self) -> list[int]:
        return [run.tasks[0].options["seed"] for run in self.runs]


def row(
    setting: Any,
    method: str,
    seeds: Iterable[int],
    *,
    steps: int = 200,
    choice: rows.Choice | None = None,
    name: str | None = None,
    tag: str = "",
    options: Options | None = None,
    tuning: str = "none",
) -> Row:
    """The row of a method at its tuned strength or at `choice`.

    Args:
        options: further options of unlearning.
    """
    if choice is None:
        choice, tuning = rows.tuned(setting, method), rows.tuning(setting, method)
    name_of_runs = label(setting, method, tag or choice.name, steps)
    given = {**choice.given, **(options or {})}
    runs = tuple(
        setting.run(name_of_runs, method, seed=s, steps=steps, options=given) for s in seeds
    )
    return Row(name or rows.title(method), runs, steps, choice, tuning)


def label(setting: Any, method: str, tag: str, steps: int) -> str:
    """The name of a method's runs in a setting; `tag` distinguishes strengths."""
    return f"{method}-{setting.regime}-{setting.loss}-{tag}-{steps}"


def paper_steps(world: World, method: str) -> int:
    """The steps in the paper's column RT; EBU's for methods that the paper does not compare."""
    table = json.loads(PAPER.read_text())[world.paper]
    (steps,) = table[rows.PAPER.get(method, "EBU")]["RT"]
    return steps


def values(row: Row) -> list[dict[str, Any]]:
    """The method's values, one dict per seed."""
    return [rows.results(run.folder)[-1]["values"] for run in row.runs]


def gather(row: Row) -> dict[str, Any]:
    """The values of a row.

    One run has its own values, with intervals over the images. Several runs have the mean with its
    95 % interval over the seeds."""
    return {**rows_over_seeds(values(row)), "steps": row.steps}


def class_wise(
    setting: Setting,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    paper: bool,
    sa_steps: int = 5000,
) -> list[Row]:
    """The rows of Tables 1 and 6.

    The paper contradicts itself on the learning rate, so that both are run at paper scale.

    Args:
        sa_steps: the steps of SA with its published strength; 0 leaves that row out.
    """
    once = (*rows.OTHERS, "embedding_only")  # one seed, as no claim depends on them
    found = []
    for m in methods:
        if m == "retrain":
            found.append(retrain(setting, seeds[0]))
        elif paper:
            found += at_paper_rates(setting, m, seeds, steps=paper_steps(setting.world, m))
        else:
            found.append(row(setting, m, seeds[:1] if m in once else seeds))
    if sa_steps and not paper:
        found.append(published_sa(setting, seeds[0], sa_steps))
    return found


def at_paper_rates(
    setting: Setting, method: str, seeds: Sequence[int], *, steps: int = 200
) -> list[Row]:
    return [
        row(
            setting,
            method,
            seeds,
            steps=steps,
            choice=rows.of_paper(method, lr),
            name=f"{rows.title(method)}, learning rate {lr:g}",
        )
        for lr in rows.PAPER_RATES
    ]


def published_sa(setting: Setting, seed: int, steps: int, **options: Any) -> Row:
    return row(
        setting,
        "selective_amnesia",
        [seed],
        steps=steps,
        tag="published",
        choice=rows.of_paper("selective_amnesia", 1e-4),
        name="SA, published strength",
        **options,
    )


def retrain(setting: Setting, seed: int) -> Row:
    """Retrain, with the steps, the learning rate and the batch of the base.

    After 200 steps from random weights, a model would generate nothing that can be recognised."""
    base = setting.world.base
    steps = base["max_train_steps"]
    same = ("train_batch_size", "lr_scheduler", "lr_warmup_steps", "mixed_precision")
    options = {name: base[name] for name in same if name in base}
    return row(
        setting,
        "retrain",
        [seed],
        steps=steps,
        choice=rows.Choice(base.get("learning_rate", 2e-4), {}),
        options={**options, "validation_steps": max(25, steps // 10), "checkpointing_steps": 1000},
    )
