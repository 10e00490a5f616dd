"""A report: one folder with results.json, results.md, report.html, plots and images."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import replacing_folder
from ..metrics.protocol import CLASS_WISE, check_protocol
from .page import html, markdown
from .plots import line_chart, pixels, png

__all__ = ["check_folder", "fid_values", "limit_rows", "write_report"]

KIND = "ebu_optim report"


def limit_rows(table: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows "base model" and "noise" from a result of :func:`classifier_metrics`."""
    rows = []
    for key, name in (("base", "base model"), ("noise", "noise")):
        values = {k: v[key] for k, v in table.items() if key in v}
        if values:
            rows.append({"name": name, "values": values})
    return rows


def fid_values(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a row from a result of :func:`fid`, or why they were not computed."""
    why = result["not_computed"]
    names = [k for k in result if k.startswith(("fid", "kid_mean", "frechet_", "kernel_"))]
    return {k: {"not_computed": why} if why else result[k] for k in names}


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    parts: Sequence[str] = CLASS_WISE,
    curves: Sequence[Mapping[str, Any]] = (),
    grids: Sequence[Mapping[str, Any]] = (),
    notes: str | Sequence[str] = (),
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the folder, completely or not at all.

    Args:
        rows: of the table: ``name`` and ``values``, key -> a number, a string, None, or another
            value that :func:`ebu_optim.report.cells.cell` accepts. The keys of
            :data:`ebu_optim.report.cells.MEASURES` have a fixed order; other keys come last.
        protocol: complete in `parts`, as :func:`ebu_optim.metrics.check_protocol` requires.
        curves: ``title``, ``x``, ``y``, ``series`` (name -> [(x, y), ...]) and, optionally,
            ``limits`` (name -> y), and ``x_scale``, "log" for a log scale.
        grids: ``title``, ``rows`` (their labels), ``columns`` (name -> (rows, n, C, H, W) images
            in [-1, 1] or uint8) and ``forgotten`` (labels that are marked).
        notes: paragraphs under the title; a string is one paragraph.
        command: the command that made the report.
        overwrite: replace an older report; another kind of folder is never replaced.

    Returns:
        The path of report.html. The page opens from disk, uses no network and runs no script.

    Raises:
        ValueError: the protocol is incomplete, a value is NaN or Inf, images have another shape, or
            a row lacks name or values.
        FileExistsError: the folder exists and holds no report, or a report without `overwrite`.
    """
    check_protocol(protocol, parts)
    for i, row in enumerate(rows):
        if not {"name", "values"} <= row.keys():
            raise ValueError(f"row {i} must have name and values; it has {list(row)}")
    if not rows:
        raise ValueError("rows must hold at least one row; give a row with the results")
    for grid in grids:
        _check_grid(grid)
    folder = Path(folder)
    check_folder(folder, overwrite)
    report = {
        "kind": KIND,
        "title": title,
        "command": command,
        "notes": [notes] if isinstance(notes, str) else list(notes),
        "rows": list(rows),
        "curves": list(curves),
        "protocol": protocol,
    }
    with replacing_folder(folder) as work:
        (work / "results.json").write_text(_json(report), encoding="utf-8")
        plots = [f"plots/{_slug(i, c['title'])}.svg" for i, c in enumerate(curves)]
        pictures = []
        for path, curve in zip(plots, curves, strict=True):
            (work / "plots").mkdir(exist_ok=True)
            # the file stands alone, so it needs its own text colour and background
            svg = line_chart(curve).replace(
                "<svg ", '<svg style="color:#1b1b1b;background:#fff" ', 1
            )
            (work / path).write_text(svg, encoding="utf-8")
        for i, grid in enumerate(grids):
            for name, images in grid["columns"].items():
                (work / "pictures").mkdir(exist_ok=True)
                path = f"pictures/{_slug(i, grid['title'])}_{_slug(None, name)}.png"
                strips = [pixels(row, width=32) for row in images]
                (work / path).write_bytes(png(torch.cat(strips)))
                pictures.append(path)
        (work / "results.md").write_text(markdown(report, plots, pictures), encoding="utf-8")
        (work / "report.html").write_text(html(report, grids), encoding="utf-8")
    return folder / "report.html"


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise the error that :func:`write_report` would raise, before the hours that a report takes.

    Raises:
        FileExistsError: the folder exists and holds no report, or a report without `overwrite`.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        ours = json.loads((folder / "results.json").read_text(encoding="utf-8"))["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise FileExistsError(f"{folder} is in use by something else; give another folder")
    if not overwrite:
        raise FileExistsError(
            f"{folder} holds a report; give overwrite=True to replace it, or another folder"
        )


def _check_grid(grid: Mapping[str, Any]) -> None:
    for name, images in grid["columns"].items():
        if images.dim() != 5 or len(images) != len(grid["rows"]):
            raise ValueError(
                f"the grid {grid['title']!r} has {len(grid['rows'])} rows; its column {name!r} "
                f"must have shape ({len(grid['rows'])}, n, C, H, W); got {tuple(images.shape)}"
            )


def _slug(i: int | None, text: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
    return words if i is None else f"{i}_{words}"


def _json(report: Mapping[str, Any]) -> str:
    def default(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    text = json.dumps(report, indent=1, default=default, ensure_ascii=False)

    def refuse(constant: str) -> float:
        raise ValueError(
            f"the results hold {constant}, but a report may not hold NaN or Inf; give None, "
            '{"more_than": n} or {"not_computed": why}'
        )

    json.loads(text, parse_constant=refuse)
    return text
