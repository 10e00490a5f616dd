"""What is left of pairs of a digit and a style: a row for each model, and the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..baselines import recipes as known
from ..metrics.intervals import mean_said
from .canvas_results import number
from .many_prompts import Pair, wordings
from .runs import Run, Task
from .text_worlds import MEASURE, UNLEARN


def looks(run: Run, counts: Sequence[int] | None, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """A row for each look at the models of a run."""
    made = [t for t in run.tasks if t.maker is UNLEARN]
    judged = [t for t in run.tasks if t.maker is not UNLEARN]
    asked = len(wordings(pairs[:1]))
    said = [json.loads((t.folder / UNLEARN.last).read_text(encoding="utf-8")) for t in made]
    numbers = sorted(set(counts)) if counts else [len(said[0]["forget"]) // asked]
    rows = []
    for n, measured, relearned in zip(numbers, judged[::2], judged[1::2]):
        took = sum(r["seconds"] for r in (said[:n] if counts else said))
        rows.append(
            {**seen(measured, pairs[:n]), "seconds": took, "relearn_steps": relearn(relearned)}
        )
    return rows


def relearn(attacked: Task) -> float:
    """Steps until the first pair is back; the maximum if it is not."""
    file = attacked.folder / "attacks.json"
    return number(json.loads(file.read_text(encoding="utf-8"))["values"]["relearn_steps"])


def seen(measured: Task, forgotten: Sequence[Pair]) -> dict[str, Any]:
    """What is left of the forgotten pairs, and of all others."""
    file = measured.folder / MEASURE.last
    pairs = json.loads(file.read_text(encoding="utf-8"))["measured"]["pair"]
    gone = [" ".join(pair) for pair in forgotten]
    kept = [name for name in pairs if name not in gone]
    worst = min(kept, key=lambda name: min(pairs[name]["content"], pairs[name]["style"]))
    return {
        "pairs": len(gone),
        "forgotten": statistics.fmean(pairs[name]["content"] for name in gone),
        "first": pairs[gone[0]]["content"],
        "content": statistics.fmean(pairs[name]["content"] for name in kept),
        "style": statistics.fmean(pairs[name]["style"] for name in kept),
        "worst": min(pairs[worst]["content"], pairs[worst]["style"]),
        "worst_pair": worst,
    }


#: Title of a column -> its value in a row, and the digits that are shown.
COLUMNS: Mapping[str, tuple[str, int]] = {
    "forgotten ↓": ("forgotten", 3),
    "the first ↓": ("first", 3),
    "kept, digit ↑": ("content", 3),
    "kept, style ↑": ("style", 3),
    "worst pair ↑": ("worst", 3),
    "relearn_steps ↑": ("relearn_steps", 1),
    "seconds": ("seconds", 0),
}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method, way and number of pairs: the mean over seeds ± half its 95 %
    interval."""
    lines = [f"| | pairs | seeds | {' | '.join(COLUMNS)} |", f"|{'---|' * (3 + len(COLUMNS))}"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["how"], row.get("method"), row["pairs"]), []).append(row)
    for (how, method, count), members in groups.items():
        title = f"{known[method].title}, {how}" if method else how
        cells = [_cell(members, *column) for column in COLUMNS.values()]
        lines.append(f"| {title} | {count} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(members: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    values = [row[name] for row in members if name in row]
    return mean_said(values, digits) if values else ""
