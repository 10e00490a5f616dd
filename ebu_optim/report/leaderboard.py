"""Models by evaluations: tables, ranks by axis and plots, on one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from .cells import cell, columns, measure, reasons
from .comparison import value
from .page import END, HEAD, table
from .plots import line_chart

#: The axes on which models are ranked.
RANKED = ("forgotten", "kept", "deep")
#: Prefixes of figures that occur in large numbers: they are in the files but not in the tables.
MANY = ("accuracy/", "count/")


class Block(NamedTuple):
    """One evaluation.

    Attributes:
        title: its label; `about` is a description.
        rows: ``name``, ``values``, ``seeds``, ``targets``, ``published`` (the source, or None).
    """

    title: str
    about: str
    rows: list[dict[str, Any]]
    notes: list[str]


def ranks(blocks: Sequence[Block]) -> dict[str, dict[str, float]]:
    """Return axis -> model -> its mean rank over the figures of the axis in all evaluations.

    1 is the best; ties share their mean rank. A figure counts only if every one of our rows has
    it. Published rows are not ranked.
    """
    found: dict[str, dict[str, list[float]]] = {axis: {} for axis in RANKED}
    for block in blocks:
        ours = [row for row in block.rows if row["published"] is None]
        for key in _shown(ours):
            m = measure(key)
            values = [value(row["values"].get(key)) for row in ours]
            if m.axis not in RANKED or not m.better or len(ours) < 2:
                continue
            there = [v for v in values if v is not None]
            if len(there) < len(values):
                continue
            signed = [-v if m.better == "higher" else v for v in there]
            for row, v in zip(ours, signed, strict=True):
                better, equal = sum(w < v for w in signed), sum(w == v for w in signed)
                found[m.axis].setdefault(row["name"], []).append(better + (equal + 1) / 2)
    return {
        axis: {name: sum(r) / len(r) for name, r in sorted(of.items(), key=lambda p: sum(p[1]))}
        for axis, of in found.items()
        if of
    }


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [k for k in columns(rows) if not k.startswith(MANY)]


def _tabled(block: Block) -> list[dict[str, Any]]:
    """Return the rows of the page's table."""
    keys, found = _shown(block.rows), []
    for row in block.rows:
        values = {k: row["values"][k] for k in keys if k in row["values"]}
        if row["seeds"]:
            values |= {"seeds": row["seeds"], "targets": ", ".join(row["targets"]) or "-"}
        found.append({"name": row["name"], "values": values})
    return found


def page(blocks: Sequence[Block], ranked: Mapping[str, Mapping[str, float]], command: str) -> str:
    """Return the page as HTML, which opens from disk, uses no network and runs no script."""
    title = "Unlearned models, compared"
    parts = [HEAD.format(title=title), f"<h1>{title}</h1>"]
    parts.append(f"<p>Made by <code>{escape(command)}</code></p>")
    if ranked:
        parts += ["<h2>Ranks</h2>", *_ranks(ranked)]
    for block in blocks:
        rows = _tabled(block)
        parts += [f"<h2>{escape(block.title)}</h2>", f"<p>{escape(block.about)}</p>"]
        parts.append(
            table(
                rows,
                f"{block.title}. In brackets the 95 % interval, over seeds where "
                "there are several, else over images.",
            )
        )
        parts += [f"<p>{escape(line)}</p>" for line in (*block.notes, *reasons(rows))]
        sources: dict[str, list[str]] = {}
        for row in block.rows:
            if row["published"]:
                sources.setdefault(row["published"], []).append(row["name"].rpartition(",")[0])
        parts += [
            f"<p>Published, {escape(', '.join(names))}: {escape(source)}</p>"
            for source, names in sources.items()
        ]
        if curve := plot(block):
            caption = f"<figcaption>{escape(curve['title'])}</figcaption>"
            parts.append(f'<div class="curves"><figure>{line_chart(curve)}{caption}</figure></div>')
    return "\n".join([*parts, END])


def plot(block: Block) -> dict[str, Any] | None:
    """Return a plot of kept over forgotten, with one point per model; None without both."""
    keys = {
        axis: next((k for k in _shown(block.rows) if measure(k).axis == axis), None)
        for axis in ("forgotten", "kept")
    }
    x, y = keys["forgotten"], keys["kept"]
    if x is None or y is None:
        return None
    pairs = {r["name"]: (value(r["values"].get(x)), value(r["values"].get(y))) for r in block.rows}
    series = {n: [p] for n, p in pairs.items() if None not in p}
    if not series:
        return None
    labels = [f"{measure(k).label}, {measure(k).better} is better" for k in (x, y)]
    return {
        "title": f"{block.title}: kept over forgotten",
        "x": labels[0],
        "y": labels[1],
        "series": series,
    }


def _ranks(ranked: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    names = dict.fromkeys(name for of in ranked.values() for name in of)
    head = "".join(f'<th scope="col">{axis}</th>' for axis in ranked)
    yield (
        '<div class="wide" tabindex="0" role="region" aria-label="Ranks"><table><caption>Mean rank '
        "over the figures of an axis, 1 is the best; published rows are not ranked.</caption>"
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead><tbody>'
    )
    for name in names:
        cells = "".join(
            f'<td class="n">{of[name]:.2f}</td>' if name in of else '<td class="n">-</td>'
            for of in ranked.values()
        )
        yield f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def lines(blocks: Sequence[Block]) -> Iterator[list[Any]]:
    """Yield one line per figure, for CSV."""
    yield [
        "evaluation",
        "model",
        "published",
        "seeds",
        "targets",
        "figure",
        "value",
        "low",
        "high",
        "not computed",
    ]
    for block in blocks:
        for row in block.rows:
            for key, of in row["values"].items():
                of = of if isinstance(of, Mapping) else {"value": of}
                yield [
                    block.title,
                    row["name"],
                    row["published"] or "",
                    row["seeds"] or "",
                    " ".join(row["targets"]),
                    key,
                    of.get("value", ""),
                    of.get("low", ""),
                    of.get("high", ""),
                    of.get("not_computed", ""),
                ]


def text(blocks: Sequence[Block], ranked: Mapping[str, Mapping[str, float]]) -> str:
    """Return the tables and ranks as Markdown, for a terminal."""
    out = []
    for block in blocks:
        keys = _shown(block.rows)
        out += ["", f"## {block.title}", "", f"| | {' | '.join(measure(k).label for k in keys)} |"]
        out.append(f"|{'---|' * (1 + len(keys))}")
        for row in block.rows:
            cells = (cell(k, row["values"].get(k)) for k in keys)
            out.append(f"| {row['name']} | {' | '.join(cells)} |")
    for axis, of in ranked.items():
        out += ["", f"rank, {axis}: {', '.join(f'{n} {r:.2f}' for n, r in of.items())}"]
    return "\n".join(out[1:])
