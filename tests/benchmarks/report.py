"""Tables (Markdown) and the plot of what bench_step.py measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes

Row = dict[str, Any]
LIMITS = {"select": "plain read", "combine": "plain copy", "step": "byte floor"}
HIDDEN = {  # of the plot: lines that lie on others
    "select": ["ours, fallback alone"],
    "step": ["plain copy", "ours, online F", "ours, online F, clipped"],
}
TITLES = {
    "select": "selection of one gradient",
    "combine": "combination",
    "step": "whole step",
    "linear": "cost per scalar",
}


def seconds(s: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if s >= size:
            return f"{s / size:.3g} {unit}"
    return f"{s / 1e-6:.3g} us"


def _memory(bytes_: float) -> str:
    return f"{bytes_ / 2**20:.{0 if bytes_ >= 2**20 * 10 else 1}f} MiB"


def _cell(value: Any, form: Any = "{:.3g}".format) -> str:
    return "" if value is None else form(value)


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
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
            [
                r["way"],
                f"{r['n']:,}",
                f"{r['tensors']:,}",
                _cell(r.get("seconds"), seconds) or r["left_out"],
                _cell(r.get("nanoseconds_per_scalar")),
            ]
            for r in rows
        ]
        head = ["", "scalars", "tensors", "time", "ns a scalar"]
        return f"\n**{TITLES[section]}**, {threads}\n\n{aligned(head, lines)}"
    lines = []
    for r in sorted(rows, key=lambda r: (not r["way"].startswith("plain"), r.get("seconds", 1e9))):
        if "left_out" in r:
            lines.append([r["way"], f"left out: {r['left_out']}", "", "", "", ""])
        else:
            lines.append(
                [
                    r["way"],
                    seconds(r["seconds"]),
                    _cell(r.get("over_limit")),
                    _cell(r.get("over_best_rival")),
                    _cell(r.get("bytes_per_scalar")),
                    _cell(r.get("fresh_bytes"), _memory),
                ]
            )
    rival = "x naive" if section == "step" else "x best rival"
    head = ["", "time", f"x {LIMITS[section]}", rival, "bytes a scalar", "fresh memory"]
    of = f"{first['n']:,} scalars in {first['tensors']:,} tensor{'s' * (first['tensors'] > 1)}"
    name = f", {first['case']}" if first["case"].startswith((shapes.DDPM, shapes.SD)) else ""
    loads = [r["others"] for r in rows if "others" in r]
    if loads and max(loads) > 0.1:
        threads += f" (other processes kept {max(loads):.1f} cores busy)"
    return f"\n**{TITLES[section]}{name}**, {of}, {threads}\n\n{aligned(head, lines)}"


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

    count = Counter(r["threads"] for r in rows)
    threads = max(count, key=lambda t: (count[t], t))  # of which there is most
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.8), sharey=True)
    for axis, section in zip(axes, ("select", "step"), strict=True):
        mine = [r for r in rows if (r["section"], r["threads"]) == (section, threads)]
        curves: dict[str, list[tuple[int, float, int]]] = {}
        for r in mine:
            if "seconds" not in r or r["way"] in HIDDEN[section]:
                continue
            point = (r["n"], r["seconds"], r["tensors"])
            curves.setdefault(r["way"], []).append(point)
            if section == "step" and r["way"] == "ours, given F":
                point = (r["n"], r["seconds"] / r["over_limit"], r["tensors"])
                curves.setdefault("byte floor of ours, given F", []).append(point)
        colours = iter(plt.get_cmap("tab10").colors[i] for i in (0, 1, 2, 4, 5, 6, 8, 9))
        for way in sorted(curves, key=lambda w: max(curves[w])[:2], reverse=True):
            style: Row = {"lw": 1.3}
            if way.startswith(("plain", "byte")):
                style |= {"color": "black", "ls": "--"}
            elif way in ("ours", "ours, given F"):
                style |= {"color": "tab:red", "lw": 2.5, "zorder": 5}
            elif way == "reference":
                style |= {"color": "0.5", "ls": ":", "lw": 2}
            else:
                style["color"] = next(colours)
            flat = sorted((n, s) for n, s, tensors in curves[way] if tensors == 1)
            x, y = [n for n, _ in flat], [s for _, s in flat]
            axis.loglog(x, y, marker="o", ms=4, label=way, **style)
            for n, s, tensors in curves[way]:
                if tensors > 1:
                    axis.plot(n, s, "D", mfc="none", mec=style["color"], ms=8)
        axis.plot([], [], "D", mfc="none", mec="0.3", ms=8, label="a model's own tensors")
        axis.set_xlabel("scalars")
        axis.set_title(f"{TITLES[section]}, {threads} thread{'s' * (threads > 1)}")
        axis.grid(alpha=0.3, which="major")
        axis.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_ylabel("seconds")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
