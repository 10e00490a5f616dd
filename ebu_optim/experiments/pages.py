"""The report of a table: its rows with their limits and the paper's rows, curves and images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..class_conditional.pages import prepared
from ..errors import InputError
from ..files import load_tensors
from ..report import write_report
from ..report.comparison import difference
from .runs import Run
from .settings import Setting
from .tables import PAPER, Row, gather, values

#: The paper's columns -> the keys here; RT is the number of steps.
COLUMNS = {
    "CE_f": "ce_f",
    "CE_r": "ce_r",
    "RA": "ra",
    "RT": "steps",
    "FID": "fid",
    "nudity_score": "nudity_score",
    "clip_score": "clip_score",
}
CURVE = 300  # last step of a table's curves
AXES = ("p_f_reject", "ra", "ra_never_replayed", "inversion_200")


def differences(table: Sequence[Row], axes: Sequence[str] = AXES) -> list[str]:
    """The first row with several seeds minus each other row with the same seeds, seed by seed."""
    several = [r for r in table if len(r.runs) > 1]
    return [
        f"{several[0].name} minus {other.name}: "
        f"{difference(values(several[0]), values(other), axes)}"
        for other in several[1:]
        if other.seeds == several[0].seeds
    ]


def paper_rows(table: str | None) -> list[dict[str, Any]]:
    """The paper's rows with their figures."""
    if table is None:
        return []
    found = []
    lines = json.loads(PAPER.read_text())[table]
    lines.pop("note", None)
    for name, line in lines.items():
        values: dict[str, Any] = {}
        for column, key in COLUMNS.items():
            if column not in line:
                continue
            cell = line[column]
            mean, *std = cell if isinstance(cell, list) else [cell]
            values[key] = {"mean": mean, "std": std[0]} if std else mean
        found.append({"name": f"the paper: {name}", "values": values})
    return found


def write(
    folder: Path,
    setting: Setting,
    table: Sequence[Row],
    *,
    title: str,
    command: str,
    notes: Sequence[str] = (),
    paper: str | None = None,
    classes: int = 10,
    plots: Sequence[Mapping[str, Any]] | None = None,
    grids: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write the report of a table; it replaces an older one with the same name.

    Args:
        plots, grids: replace the curves and the images of the table.
    """
    first = json.loads((table[0].runs[0].folder / "results.json").read_text())
    limits = first["rows"][:-1]
    said = first["protocol"]
    said["unlearning"] |= {
        "method": "each row's",
        "settings": settings(table),
        "steps": "each row's",
        "learning_rate": "each row's, constant",
        "forget_loss": f"{said['unlearning']['forget_loss']}; GA and SalUn on the real images of "
        "the class, EraseDiff on these with uniform noise",
        "trained": "all, but the class embedding where the row says so",
        "tuning": "each row's; trials are tune.py's: partial replay, seed 0, which is not "
        "reported, score (1 - P_f) + accuracy on what was never replayed + (1 - P_f after 100 "
        "steps of inversion)",
    }
    said["data"] |= {
        "replay_set": f"{prepared(setting.sets.folder)}; remember data: replay, of Retrain real"
    }
    if "timing" in said:
        said["timing"] |= {
            "seconds": f"{said['timing']['seconds']}; nor is the Fisher that SA takes from "
            "prepare.py, nor SalUn's mask",
            "hardware": f"{said['timing']['hardware']}; other runs of the table may have been "
            "beside it",
        }
    notes = list(notes)
    if plots is None and any(p["step"] > CURVE for r in table for p in curve(r.runs[0])):
        notes.append(f"The curves end at step {CURVE}.")
    return report(
        folder,
        setting,
        table,
        said=said,
        limits=limits,
        title=title,
        command=command,
        notes=notes,
        paper=paper,
        plots=curves(table) if plots is None else plots,
        parts=[p for p in said if p != "fid" or "fid" in gather(table[0])],
        grids=[pictures(setting, table, classes)] if grids is None else grids,
        one="one base model and one replay set",
        shown="Curves and images",
    )


def settings(table: Sequence[Row]) -> dict[str, Any]:
    """The settings of every row, for the protocol."""
    return {
        r.name: {
            "learning_rate": r.choice.learning_rate,
            **r.choice.options,
            "steps": r.steps,
            "seeds": r.seeds,
            "tuning": r.tuning,
        }
        for r in table
    }


def report(
    folder: Path,
    setting: Any,
    table: Sequence[Row],
    *,
    said: dict[str, Any],
    limits: Sequence[Mapping[str, Any]],
    title: str,
    command: str,
    notes: Sequence[str],
    paper: str | None,
    parts: Sequence[str],
    plots: Sequence[Mapping[str, Any]],
    grids: Sequence[Mapping[str, Any]],
    one: str,
    shown: str,
    axes: Sequence[str] = AXES,
) -> Path:
    """Write the report of any table, with limits and the paper's rows, and print its summary.

    Args:
        said: the protocol.
        limits: the rows that come first: the base model, noise.
        one: what the seeds share, in words.
        shown: the parts that show only the first seed, in words.
        axes: the keys of the differences from the first row.
    """
    said["seeds"] |= {"unlearning": sorted({s for r in table for s in r.seeds})}
    notes = [*notes, *([setting.world.smoke] if setting.world.smoke else [])]
    most = max(len(r.runs) for r in table)
    if most > 1:
        notes.append(
            f"Several seeds of unlearning, with {one}: mean and 95 % interval (Student's t) over "
            "them. One seed: 95 % interval over the images, where there is one. "
            f"{shown}: seed {table[0].seeds[0]} alone. Differences: seed by seed, intervals not "
            "widened for the number of comparisons."
        )
        notes += differences(table, axes)
    if paper:
        notes.append(
            f"The paper's figures are of its own model and data ({paper}); ours are of "
            f"{setting.world.title}. Compare orders, not figures."
        )
    ours: list[dict[str, Any]] = [{"name": r.name, "values": gather(r)} for r in table]
    if most > 1:
        for line, r in zip(ours, table, strict=True):
            line["values"]["seeds"] = len(r.runs)
    page = write_report(
        folder,
        title=title,
        protocol=said,
        overwrite=folder.exists(),
        command=command,
        rows=[*limits, *ours, *paper_rows(paper)],
        parts=parts,
        curves=plots,
        notes=notes,
        grids=grids,
    )
    print((folder / "results.md").read_text().split("\n## ")[0])
    print(f"\nsee {page}")
    return page


def curve(run: Run) -> list[dict[str, Any]]:
    return json.loads((run.tasks[0].folder / "unlearn.json").read_text())["curve"]


def curves(table: Sequence[Row], x: str = "step") -> list[dict[str, Any]]:
    """Curves of P_f and accuracy over the steps, for the first seed of each row."""
    # all three come from the classifier that measured the curve, see Setting.run
    labels = {
        "p_f": "P_f, reject class",
        "ra": "RA, reject class",
        "ra_never_replayed": "RA, never replayed, reject class",
    }
    found = []
    for key, label in labels.items():
        series = {
            r.name: [(p[x], p[key]) for p in curve(r.runs[0]) if p["step"] <= CURVE]
            for r in table
            if curve(r.runs[0]) and key in curve(r.runs[0])[0]
        }
        if series:
            found.append({"title": label, "x": "steps", "y": label, "series": series})
    return found


def samples(setting: Setting, model: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The images that the model with this hash generated, and their labels.

    Raises:
        InputError: the file is missing.
    """
    path = setting.root / "samples" / f"{model}.safetensors"
    if not path.exists():
        raise InputError(
            f"{path} is missing: delete the report of that model to generate its images again"
        )
    tensors, _ = load_tensors(path)
    return tensors["images"], tensors["labels"]


def pictures(setting: Setting, table: Sequence[Row], classes: int, each: int = 6) -> dict[str, Any]:
    """The first images of the base and of every row for some classes, from the same noise."""
    made = json.loads((table[0].runs[0].tasks[0].folder / "unlearn.json").read_text())
    info = json.loads((setting.base.folder / "classes.json").read_text())
    names = info["classes"]
    shown = [*made["forget"], *(c for c in range(len(names)) if c not in made["forget"])][:classes]
    hashes = {"base": made["base_hash"]}
    for r in table:
        of = json.loads((r.runs[0].tasks[0].folder / "classes.json").read_text())
        hashes[r.name] = of["hash"]
    columns = {}
    for name, model in hashes.items():
        images, labels = samples(setting, model)
        columns[name] = torch.stack([images[labels == c][:each] for c in shown])
    return {
        "title": "samples of every method, from the same noise",
        "rows": [names[c] for c in shown],
        "columns": columns,
        "forgotten": [names[c] for c in made["forget"]],
    }
