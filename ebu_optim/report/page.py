"""The report as one self-contained HTML file, and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .cells import AXES, cell, columns, measure, reasons
from .plots import line_chart, pixels, png

# the policy makes a browser refuse any request of the file to the network
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #c8c8c8; --head: #f2f2f2;
  --forgotten: #a6320a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --paper: #16181a; --line: #4a4d50; --head: #24282b;
    --forgotten: #ff9d73; }}
}}
@media print {{
  :root {{ color-scheme: light; --ink: #000; --paper: #fff; --line: #999; --head: #eee;
    --forgotten: #a6320a; }}
  figure, tr {{ break-inside: avoid; }}
  .wide {{ overflow: visible; }}
  table {{ font-size: 8pt; }}
}}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 0 auto; padding: 1rem 1.25rem 3rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ border: 1px solid var(--line); padding: .3rem .55rem; text-align: left;
  vertical-align: top; }}
thead th {{ background: var(--head); vertical-align: bottom; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
small {{ font-weight: normal; display: block; }}
.wide {{ overflow-x: auto; }}
.curves {{ display: flex; flex-wrap: wrap; gap: 1.5rem; }}
.curves figure {{ flex: 1 1 26rem; max-width: 40rem; margin: 0; }}
svg {{ width: 100%; height: auto; }}
.grid th, .grid td {{ border: 0; padding: .1rem .5rem; vertical-align: middle; }}
.grid img {{ display: block; image-rendering: pixelated; max-width: 100%; height: auto; }}
.forgotten {{ color: var(--forgotten); }}
code {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
<main>
"""


def html(report: Mapping[str, Any], grids: Sequence[Mapping[str, Any]]) -> str:
    parts = [HEAD.format(title=escape(report["title"])), f"<h1>{escape(report['title'])}</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in report["notes"]]
    if report["command"]:
        parts.append(f"<p>Made by <code>{escape(report['command'])}</code></p>")
    parts += ["<h2>Results</h2>", table(report["rows"])]
    parts += [f"<p>{escape(reason)}</p>" for reason in reasons(report["rows"])]
    if grids:
        parts.append("<h2>Images</h2>")
        parts += [_grid(grid) for grid in grids]
    if report["curves"]:
        parts.append('<h2>Curves</h2>\n<div class="curves">')
        for curve in report["curves"]:
            caption = f"<figcaption>{escape(curve['title'])}</figcaption>"
            parts.append(f"<figure>{line_chart(curve)}{caption}</figure>")
        parts.append("</div>")
    for part, said in report["protocol"].items():
        parts.append(_said(f"Protocol: {part}", said))
    return "\n".join([*parts, END])


END = "</main>\n</body>\n</html>\n"
THUMBNAIL = 128  # pixels; the image files next to the page have their full size
UPRIGHT = 6  # up to this many models, the measures are the rows, so all axes are visible at once


CAPTION = (
    "Three axes, always together: forgotten, kept, deep; and the time it took. In brackets the "
    "95 % interval, over images, or over seeds in a row of several; ± the spread over seeds."
)


def table(rows: Sequence[Mapping[str, Any]], caption: str = CAPTION) -> str:
    """Return a table of rows as for :func:`ebu_optim.report.write_report`."""
    keys = columns(rows)
    by_axis = {axis: [k for k in keys if measure(k).axis == axis] for axis in AXES}
    groups = {axis: found for axis, found in by_axis.items() if found}
    body = _upright(rows, groups) if len(rows) <= UPRIGHT else _flat(rows, groups)
    return "\n".join(
        [
            '<div class="wide" role="region" aria-label="Results" tabindex="0"><table>',
            f"<caption>{escape(caption)}</caption>",
            *body,
            "</table></div>",
        ]
    )


def _upright(
    rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Yield a table with one row per measure and one column per model."""
    names = "".join(f'<th scope="col">{escape(row["name"])}</th>' for row in rows)
    yield f'<thead><tr><th scope="col">axis</th><th scope="col">measure</th>{names}</tr></thead>'
    for axis, keys in groups.items():
        yield "<tbody>"
        first = f'<th scope="rowgroup" rowspan="{len(keys)}">{axis}</th>'
        for key in keys:
            cells = "".join(_cell(key, row) for row in rows)
            yield f'<tr>{first}<th scope="row">{_label(key)}</th>{cells}</tr>'
            first = ""
        yield "</tbody>"


def _flat(rows: Sequence[Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a table with one row per model and one column per measure."""
    axes = "".join(
        f'<th colspan="{len(keys)}" scope="colgroup">{axis}</th>' for axis, keys in groups.items()
    )
    keys = [key for found in groups.values() for key in found]
    labels = "".join(f'<th scope="col">{_label(key)}</th>' for key in keys)
    yield f'<thead><tr><th rowspan="2" scope="col">model</th>{axes}</tr><tr>{labels}</tr></thead>'
    yield "<tbody>"
    for row in rows:
        cells = "".join(_cell(key, row) for key in keys)
        yield f'<tr><th scope="row">{escape(row["name"])}</th>{cells}</tr>'
    yield "</tbody>"


def _label(key: str) -> str:
    m = measure(key)
    small = ", ".join(s for s in (m.unit, m.better and f"{m.better} is better") if s)
    return f"{escape(m.label)}<small>{escape(small)}</small>"


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value, bracket, interval = cell(key, row["values"].get(key)).partition(" [")
    small = f"<small>{escape(bracket.strip() + interval)}</small>" if bracket else ""
    return f'<td class="n">{escape(value)}{small}</td>'


def _grid(grid: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid["columns"])
    out = [
        f'<figure><div class="wide" role="region" aria-label="{escape(grid["title"])}" '
        f'tabindex="0"><table class="grid"><thead><tr><td></td>{head}</tr></thead><tbody>'
    ]
    for i, label in enumerate(grid["rows"]):
        forgotten = label in grid.get("forgotten", ())
        mark, style = (" (forgotten)", ' class="forgotten"') if forgotten else ("", "")
        out.append(f'<tr><th scope="row"{style}>{escape(label)}{mark}</th>')
        for name, images in grid["columns"].items():
            x = pixels(images[i], at_most=THUMBNAIL)
            side = min(images.shape[-1], THUMBNAIL)
            scale = round(28 / side) if side < 28 else min(1, 96 / side)
            data = base64.b64encode(png(x)).decode()
            alt = f"{name}: {len(images[i])} images of {label}{mark}"
            out.append(
                f'<td><img src="data:image/png;base64,{data}" alt="{escape(alt)}" '
                f'width="{round(x.shape[1] * scale)}" height="{round(x.shape[0] * scale)}"></td>'
            )
        out.append("</tr>")
    caption = f"<figcaption>{escape(grid['title'])}</figcaption>"
    return "\n".join([*out, "</tbody></table></div>", caption, "</figure>"])


def plain(value: Any) -> str:
    """Return a protocol's value as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)


def _said(title: str, said: Any) -> str:
    entries = said.items() if isinstance(said, Mapping) else [("", said)]
    lines = "".join(
        f'<tr><th scope="row">{escape(str(k))}</th><td>{escape(plain(v))}</td></tr>'
        for k, v in entries
    )
    return f"<h2>{escape(title)}</h2>\n<table><tbody>{lines}</tbody></table>"


def markdown(report: Mapping[str, Any], plots: Sequence[str], pictures: Sequence[str]) -> str:
    """Return title, table, plots and protocol; `plots` and `pictures` are relative paths."""
    rows, keys = report["rows"], columns(report["rows"])
    heads = []
    for key in keys:
        m = measure(key)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(m.better, "")
        heads.append(f"{m.axis}: {m.label}{arrow}")
    lines = [f"# {report['title']}", "", *(f"{note}\n" for note in report["notes"])]
    if report["command"]:
        lines += [f"Made by `{report['command']}`.", ""]
    lines += [_row(["model", *heads]), _row(["---"] * (1 + len(keys)))]
    lines += [_row([r["name"], *(cell(k, r["values"].get(k)) for k in keys)]) for r in rows]
    lines += ["", *(f"- {reason}" for reason in reasons(rows)), ""]
    lines += [f"![{path}]({path})" for path in (*pictures, *plots)]
    for part, said in report["protocol"].items():
        lines += ["", f"## Protocol: {part}", ""]
        entries = said.items() if isinstance(said, Mapping) else [("", said)]
        lines += [f"- {k}: {plain(v)}" for k, v in entries]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
