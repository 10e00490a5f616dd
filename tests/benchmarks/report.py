"""Tables (Markdown) and the plot of what bench_step.py measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes

Row = dict[str, Any]
LIMITS = {"select": "plain read", "combine": "plain copy", "step": "byte floor"}
TITLES = {
    "select": "selection of one gradient", "combine": "combination", "step": "whole step",
    "linear": "cost per scalar",
}  # fmt: skip


def _seconds(s: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s / 1e-6:.3g} us"


def _memory(bytes_: float) -> str:
    return f"{bytes_ / 2**20:.{0 if bytes_ >= 2**20 * 10 else 1}f} MiB"


def _cell(value: Any, form: Any = "{:.3g}".format) -> str:
    return "" if value is None else form(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, lines)])


def table(rows: Sequence[Row]) -> str:
    """One section, one case, one number of threads."""
    section, first = rows[0]["section"], rows[0]
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    if section == "linear":
        lines = [
            [r["way"], f"{r['n']:,}", f"{r['tensors']:,}",
             _cell(r.get("seconds"), _seconds) or r["left_out"],
             _cell(r.get("nanoseconds_per_scalar"))]
            for r in rows
        ]  # fmt: skip
        head = ["", "scalars", "tensors", "time", "ns a scalar"]
        return f"\n**{TITLES[section]}**, {threads}\n\n{_table(head, lines)}"
    lines = []
    for r in sorted(rows, key=lambda r: (not r["way"].startswith("plain"), r.get("seconds", 1e9))):
        if "left_out" in r:
            lines.append([r["way"], f"left out: {r['left_out']}", "", "", "", ""])
        else:
            lines.append([
                r["way"], _seconds(r["seconds"]), _cell(r.get("over_limit")),
                _cell(r.get("over_best_rival")), _cell(r.get("bytes_per_scalar")),
                _cell(r.get("fresh_bytes"), _memory),
            ])  # fmt: skip
    rival = "x naive" if section == "step" else "x best rival"
    head = ["", "time", f"x {LIMITS[section]}", rival, "bytes a scalar", "fresh memory"]
    of = f"{first['n']:,} scalars in {first['tensors']:,} tensor{'s' * (first['tensors'] > 1)}"
    name = f", {first['case']}" if first["case"].startswith((shapes.DDPM, shapes.SD)) else ""
    loads = [r["others"] for r in rows if "others" in r]
    if loads and max(loads) > 0.1:
        threads += f" (other processes kept {max(loads):.1f} cores busy)"
    return f"\n**{TITLES[section]}{name}**, {of}, {threads}\n\n{_table(head, lines)}"


def everything(rows: Sequence[Row]) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    order = list(TITLES)
    for r in sorted(rows, key=lambda r: (order.index(r["section"]), -r["threads"], r["n"])):
        groups.setdefault((r["section"], r["threads"], r["case"]), []).append(r)
    return "\n".join(map(table, groups.values()))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds by scalars, flat vectors as lines and the models' tensors as hollow marks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = max(r["threads"] for r in rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for axis, section in zip(axes, ("select", "step"), strict=True):
        mine = [r for r in rows if r["section"] == section and r["threads"] == threads]
        mine = [r for r in mine if "seconds" in r]
        floors: list[tuple[int, float, int]] = [
            (r["n"], r["seconds"] / r["over_limit"], r["tensors"])
            for r in mine
            if section == "step" and r["way"] == "ours, given F"
        ]
        curves = {
            way: [(r["n"], r["seconds"], r["tensors"]) for r in mine if r["way"] == way]
            for way in dict.fromkeys(r["way"] for r in mine)
            if section == "select" or way in ("naive", "ours, given F", "ours, online F")
        }
        if floors:
            curves = {"byte floor, given F": floors, **curves}
        for way, points in curves.items():
            limit = way.startswith(("plain", "byte"))
            style = {"color": "0.35", "ls": "--"} if limit else {}
            if way.startswith("ours") and "fallback" not in way and "online" not in way:
                style = {"color": "tab:red", "lw": 2.5, "zorder": 5}
            flat = sorted((n, s) for n, s, tensors in points if tensors == 1)
            label = f"{way} (limit)" if limit else way
            (line,) = axis.loglog(*zip(*flat, strict=True), label=label, **style)
            line.set_marker("o")
            line.set_markersize(4)
            several = [(n, s) for n, s, tensors in points if tensors > 1]
            for n, s in several:
                axis.plot(n, s, "D", mfc="none", mec=line.get_color(), ms=8)
        axis.set_xlabel("scalars")
        axis.set_title(f"{TITLES[section]}, {threads} threads")
        axis.grid(alpha=0.3, which="major")
        axis.plot([], [], "D", mfc="none", mec="0.3", ms=8, ls="", label="a model's own tensors")
        axis.legend(fontsize=7.5, loc="upper left")
    axes[0].set_ylabel("seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
