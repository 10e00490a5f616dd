"""Compare models with each other and with the figures in papers.

    ebu compare evaluated/ other/protocols.json -o compared

reads the output of `ebu evaluate` and writes one self-contained page, compared/index.html, with
compared.json and compared.csv. A row is a method: the mean over its targets, and over its seeds
with a 95 % interval. Published rows are marked and name their source.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import replacing
from ..report import leaderboard
from ..report.comparison import rows_over_seeds, value
from ..training.fields import option
from .named import published

RESULT = "protocols.json"
#: Figures that are not in percent, even in a row with the unit "percent".
_PLAIN = ("fid", "seconds", "gpu_memory_gb")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """The runs to compare."""

    runs: list[str] = option(
        positional="RUNS",
        nargs="+",
        help="Output folders of `ebu evaluate`, or their protocols.json.",
    )
    names: list[str] = option(
        [],
        metavar="MODEL=NAME",
        help="Name of a model in the table. Models with the same name count as seeds of one "
        "method.",
    )
    output_dir: Path = option(
        flag=("-o", "--output_dir"), help="Folder for the page, the JSON and the CSV."
    )

    def __post_init__(self) -> None:
        if wrong := [word for word in self.names if not all(word.rpartition("=")[::2])]:
            raise InputError(f"--names {wrong[0]!r}: give MODEL=NAME")


def compare(args: Compare) -> list[leaderboard.Block]:
    """Write the page, JSON and CSV into ``args.output_dir``.

    Returns:
        A block of rows for each evaluation.

    Raises:
        InputError: a run cannot be read.
    """
    rows = [row for run in args.runs for row in read(Path(run))]
    pairs = (word.rpartition("=") for word in args.names)
    blocks = blocks_of(rows, {model: name for model, _, name in pairs})
    ranks = leaderboard.ranks(blocks)
    files = {
        "compared.json": json.dumps(
            {"blocks": [b._asdict() for b in blocks], "ranks": ranks}, indent=1, ensure_ascii=False
        ),
        "index.html": leaderboard.page(blocks, ranks, f"ebu compare {' '.join(args.runs)}"),
    }
    for name, text in files.items():
        with replacing(args.output_dir / name) as work:
            work.write_text(text, encoding="utf-8")
    with (
        replacing(args.output_dir / "compared.csv") as work,
        open(work, "w", newline="", encoding="utf-8") as opened,
    ):
        csv.writer(opened).writerows(leaderboard.lines(blocks))
    print(leaderboard.text(blocks, ranks))
    print(f"saved {args.output_dir / 'index.html'}, compared.json and compared.csv")
    return blocks


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run.

    Raises:
        InputError: the file cannot be read or has no rows.
    """
    file = run / RESULT if run.is_dir() else run
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"model", "label", "figures", "forget", "protocol"}
        if not rows or any(wanted - row.keys() for row in rows):
            raise ValueError(f"it has no rows with {', '.join(sorted(wanted))}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"RUNS {run}: no {RESULT} of `ebu evaluate` can be read there ({error}): give the "
            "output folder of `ebu evaluate`"
        ) from error
    return list(rows)


def blocks_of(
    rows: Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> list[leaderboard.Block]:
    """One block per evaluation: rows by label and by the kind of the forgotten target."""
    rows = list(rows)
    called = _called(rows, names)
    by_block: dict[tuple[str, str], dict[str, dict[Any, list[Mapping[str, Any]]]]] = {}
    for row in rows:
        methods = by_block.setdefault((row["label"], row.get("kind", "")), {})
        seeds = methods.setdefault(called[_identity(row)], {})
        seeds.setdefault(_seed(row, names), []).append(row)
    blocks = []
    for (label, kind), methods in by_block.items():
        ours = [_ours(name, seeds) for name, seeds in methods.items()]
        first = next(iter(next(iter(methods.values())).values()))[0]
        each = (_theirs(row, kind) for row in published(first["protocol"]["name"]))
        theirs = [row for row in each if row]
        title = f"{label}, {kind}" if kind else label
        notes = list(first["protocol"].get("notes", ()))
        if theirs and "changed:" in label:
            notes.insert(0, "What is changed is no part of the published rows.")
        if len({tuple(row["targets"]) for row in ours if row["targets"]}) > 1:
            notes.insert(0, "Not every row is of the same targets: see the column.")
        uneven = [row["name"] for row in ours if not row["whole"]]
        if uneven:
            notes.insert(0, f"The seeds are not all of the same targets: {', '.join(uneven)}.")
        blocks.append(leaderboard.Block(title, first["protocol"]["title"], [*ours, *theirs], notes))
    return blocks


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    run = row.get("run") or {}
    own = "" if run else row["model"]
    return run.get("method", ""), run.get("settings", ""), own


def _seed(row: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """What identifies a run of a method: its seed, or the model if the seed is unknown."""
    if row["model"] in names:
        return row["model"]
    return (row.get("run") or {}).get("seed", row["model"])


def _called(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[Any, str]:
    """Identity -> name. If a method has several settings, the names include their hashes."""
    settings: dict[str, set[str]] = {}
    for row in rows:
        method, of, _ = _identity(row)
        settings.setdefault(method, set()).add(of)
    found = {}
    for row in rows:
        method, of, model = identity = _identity(row)
        name = f"{method} ({of})" if len(settings[method]) > 1 else method
        found[identity] = names.get(row["model"]) or name or model
    return found


def _ours(name: str, seeds: Mapping[Any, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    targets = sorted({" and ".join(r["forget"]) for several in seeds.values() for r in several})
    each = [_over_targets([row["figures"] for row in several]) for several in seeds.values()]
    same = {tuple(sorted(map(str, (r["forget"] for r in several)))) for several in seeds.values()}
    return {
        "name": name,
        "values": rows_over_seeds(each),
        "seeds": len(seeds),
        "targets": [t for t in targets if t],
        "published": None,
        "whole": len(same) == 1,
    }


def _over_targets(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over targets with equal weights; the figures themselves if there is one target."""
    if len(figures) == 1:
        return dict(figures[0])
    found: dict[str, Any] = {}
    for key in dict.fromkeys(k for one in figures for k in one):
        values = [value(one.get(key)) for one in figures]
        there = [v for v in values if v is not None]
        if len(there) == len(values):
            found[key] = sum(there) / len(there)
        else:
            lacking = next(f.get(key) for f, v in zip(figures, values, strict=True) if v is None)
            why = "not computed: some targets have no such value"
            found[key] = lacking or {"not_computed": why}
    return found


def _theirs(row: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """A published row in the units of this package; None if it has another kind of target."""
    target = row.get("target") or ""
    if kind and target != kind:
        return None
    percent = row["unit"] == "percent"
    values = {
        k: v / 100 if percent and not k.startswith(_PLAIN) else v for k, v in row["figures"].items()
    }
    of = f" ({target})" if target and not kind else ""
    copied = ", as another paper copied it" if row.get("second_hand") else ""
    return {
        "name": f"{row['method']}{of}, published",
        "values": values,
        "seeds": None,
        "targets": [],
        "published": f"{row['source']}{copied}",
        "whole": True,
    }
