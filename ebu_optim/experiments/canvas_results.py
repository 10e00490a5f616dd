"""The figures of UnlearnCanvas in small in one file: the means and worst cases of each method, each
run, and what attacks found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {"style": "styles", "object": "digits"}
FIGURES = ("ua", "ira", "cra")
#: Figures of attacks.json.
DEPTH = (
    "paraphrase_worst",
    "inversion_100",
    "cce",
    "unlearndiffatk",
    "tina",
    "tina_error",
    "tina_control_error",
    "relearn_steps",
    "lora_relearn_steps",
)

Row = Mapping[str, Any]


def read(files: Iterable[Path], base: str) -> list[dict[str, Any]]:
    """A row for each evaluated model; rows of a model without a method are the `base`'s."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [_row(row, base) for rows in found for row in rows]


def _row(found: Row, base: str) -> dict[str, Any]:
    figures, made = found["figures"], found.get("run") or {}
    kept = {
        name.partition("/")[2]: figure["value"]
        for name, figure in figures.items()
        if name.startswith("accuracy/") and name.partition("/")[2] not in found["forget"]
    }
    worst = min(kept, key=lambda name: kept[name])
    return {
        "method": made.get("method", base),
        "seed": made.get("seed"),
        "kind": found["kind"],
        "target": found["forget"][0],
        **{name: figures[name] for name in FIGURES},
        "worst_kept": {"name": worst, "value": kept[worst]},
        "label": found["label"],
        "judges": found["protocol"]["judges"],
    }


def results(rows: Sequence[Row], ranks: Any, attacked: Sequence[Row], command: str) -> Row:
    """Everything that a page shows."""
    means = {kind: _means([row for row in rows if row["kind"] == kind]) for kind in KINDS}
    both = [m for m in means["style"] if m in means["object"]]
    return {
        "command": command,
        "both": [_both(m, [means[kind][m] for kind in KINDS]) for m in both],
        **{kind: list(of.values()) for kind, of in means.items()},
        "attacked": _attacked(attacked),
        "ranks": ranks,
        "runs": list(rows),
        "attacked_runs": list(attacked),
    }


def _means(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each method the mean over targets and seeds, and the worst of them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return {
        name: {
            "name": name,
            "seeds": len({row["seed"] for row in of}),
            "targets": len({row["target"] for row in of}),
            **{figure: statistics.fmean(row[figure]["value"] for row in of) for figure in FIGURES},
            "worst_ua": min(row["ua"]["value"] for row in of),
            "worst_kept": min(row["worst_kept"]["value"] for row in of),
        }
        for name, of in found.items()
    }


def _both(name: str, means: Sequence[Row]) -> dict[str, Any]:
    return {
        "name": name,
        "seeds": means[0]["seeds"],
        **{KINDS[kind]: {f: mean[f] for f in FIGURES} for kind, mean in zip(KINDS, means)},
        "lowest_ua": min(mean["worst_ua"] for mean in means),
        "lowest_kept": min(mean["worst_kept"] for mean in means),
    }


def _attacked(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each method the mean over the attacked targets of each kind."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        groups.setdefault(row["method"], {}).setdefault(row["kind"], []).append(row["values"])
    return [
        {"name": method, **{KINDS[kind]: _depth(of) for kind, of in kinds.items()}}
        for method, kinds in groups.items()
    ]


def _depth(members: Sequence[Row]) -> dict[str, Any]:
    known = [name for name in DEPTH if all(name in values for values in members)]
    means = {n: statistics.fmean(number(v[n]) for v in members) for n in known}
    return {"targets": len(members), **means}


def number(figure: Row) -> float:
    """A share, or a number of steps: the last one that was tried if the target was not back."""
    if "value" in figure:
        return float(figure["value"])
    return float(figure["steps"] if figure["reached"] else figure["within"])
