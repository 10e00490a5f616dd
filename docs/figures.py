"""Fill the figures of the pages from the JSON files that they come from.

    python docs/figures.py            # write them
    python docs/figures.py --check    # name those that are not what the JSON says; exit status 1

A figure stands between two comments:

    <!--=evidence.json: runs/#count ; d-->352<!--/-->

The file is in docs/evidence, or it is a report in docs/results (`digits/table6-full-replay`), or
the differences that such a report lists (`digits/table6-full-replay/differences`: `EBU added minus
SA/RA`). The path goes down by keys, and by

    [method=joint,options/gamma!=100]  the one item of a list of which this is true
    *[method=joint]  or  *             every such item: the rest of the path is applied to each
    #count #sum #mean #sd #min #max    last, of many; #spread: the mean ± the standard deviation

`path - path` is a difference and `path / path` a ratio. The format is Python's; `/ 2**30` or
`* 100` after it scales the value first, and a last `±` or `[]` adds the interval that the report
has. `time` and `MiB` choose the unit or the digits by the size. A line must not begin with such a
comment, which Markdown would take for a block of HTML.

A table stands between two lines of their own:

    <!--table=digits/table6-full-replay: rows/[name={}]/values/ ; p_f_reject .3f ; ce_f .2f-->
    <!--/table-->

The header and the first cell of each row are the page's. Each column's key is added to the path, in
which `{}` is that cell; a column `-` stays as it is. A value is written with its interval, where it
has one. Where the first cells are no keys, ` by p_f .3f ; relearn_steps .0f` at the end has what
`{}` is in each row, and the row's format. Without a path the whole results.md of the report stands
there.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
FIGURE = re.compile(
    r"(<!--=(?P<file>[^:]+): (?P<path>.+?) ; (?P<format>.+?)-->)(?P<said>.*?)(<!--/-->)", re.DOTALL
)
TABLE = re.compile(
    r"^(?P<open><!--table=(?P<file>[^:\n]+?)(?:: (?P<path>[^\n]+?) ; (?P<columns>[^\n]+?)"
    r"(?: by (?P<rows>[^\n]+))?)?-->\n)"
    r"(?P<said>.*?)"
    r"^(?P<close><!--/table-->)$",
    re.DOTALL | re.MULTILINE,
)
FORMAT = re.compile(
    r"^(?P<spec>\S+?)(?: (?P<sign>[*/]) (?P<base>-?\d+)(?:\*\*(?P<power>\d+))?)?"
    r"(?: (?P<interval>±|\[\]))?$"
)
COLUMN = re.compile(r"(.+?)(?: ((?:time|MiB|[+,]*(?:\.\d+)?[defg])(?: [*/] -?\d+(?:\*\*\d+)?)?))?")
DIFFERENCES = re.compile(
    r"^(?:- )?(?P<pair>.+ minus .+?)(?: \(\d+ seeds\))?: (?P<all>.+)$", re.MULTILINE
)
DIFFERENCE = re.compile(r"(\S[^;]*?) ([+-]\d\S*) \[(\S+), (\S+)\](?:[;,] )?")
OF_MANY: dict[str, Callable[[list[Any]], Any]] = {
    "#count": len,
    "#sum": sum,
    "#mean": statistics.mean,
    "#sd": statistics.stdev,
    "#min": min,
    "#max": max,
    "#spread": lambda values: spread(statistics.mean(values), statistics.stdev(values)),
}


def spread(mean: float, sd: float) -> dict[str, float]:
    return {"value": mean, "low": mean - sd, "high": mean + sd}


@cache
def content(name: str) -> Any:
    """A JSON file of docs/evidence, a report of docs/results, or the differences it lists."""
    if name.endswith(".json"):
        return json.loads((DOCS / "evidence" / name).read_text(encoding="utf-8"))
    if name.endswith("/differences"):
        page = report(name.removesuffix("/differences"), "results.md")
        return {
            line["pair"]: {
                measure: {"value": float(value), "low": float(low), "high": float(high)}
                for measure, value, low, high in DIFFERENCE.findall(line["all"])
            }
            for line in DIFFERENCES.finditer(page)
        }
    return json.loads(report(name, "results.json"))


def report(name: str, file: str) -> str:
    return (DOCS / "results" / name / file).read_text(encoding="utf-8")


def matches(item: Any, conditions: str) -> bool:
    """Whether all of `a=1,b/c!=x` hold of an item; a missing key is "none"."""
    for condition in filter(None, re.split(r",(?=\S+=)", conditions)):
        path, sign, wanted = re.split("(!?=)", condition, maxsplit=1)
        found = item
        for key in path.split("/"):
            found = found.get(key) if isinstance(found, dict) else None
        numbers = type(found) is float and wanted != "none"
        same = found == float(wanted) if numbers else str(found).casefold() == wanted.casefold()
        if same != (sign == "="):
            return False
    return True


def look_up(value: Any, path: str) -> Any:
    """What is at a path.

    Raises:
        KeyError: nothing is, or an item that should be one is several.
    """
    # a slash inside [...] belongs to a condition
    steps = re.findall(r"(?:\[[^\]]*\]|[^/\[])+", path)
    for i, step in enumerate(steps):
        if step in OF_MANY:
            return OF_MANY[step](list(value))
        if step.startswith(("*", "[")):
            items = list(value.values()) if isinstance(value, dict) else value
            found = [v for v in items if matches(v, step.strip("*[]"))]
            rest = "/".join(steps[i + 1 :])
            if step.startswith("["):
                if len(found) != 1:
                    raise KeyError(f"{step} is true of {len(found)} items")
                value = found[0]
                continue
            last = steps[-1] if steps[-1] in OF_MANY else ""
            rest = rest.removesuffix(last).rstrip("/")
            each = [look_up(v, rest) if rest else v for v in found]
            if "*" in rest:  # items of items are one list
                each = [v for values in each for v in values]
            return OF_MANY[last](each) if last else each
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def time(seconds: float) -> str:
    unit, size = next(u for u in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if seconds >= u[1])
    return f"{seconds / size:.3g} {unit}"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.{0 if size >= 2**20 * 10 else 1}f} MiB"


def value_of(file: str, path: str) -> Any:
    """What is at a path, or the difference or the ratio of two."""
    first, sign, second = re.match(r"(.+?)(?: ([-/]) (.+))?$", path).groups()  # type: ignore[union-attr]
    value = look_up(content(file), first)
    if not second:
        return value
    one, other = bare(value), bare(look_up(content(file), second))
    return one - other if sign == "-" else one / other


def text(file: str, path: str, how: str) -> str:
    """A figure as the page shows it."""
    return shown(value_of(file, path), how)


def bare(value: Any) -> float:
    """The number of a report's value, without its interval; steps, where it is an event."""
    if isinstance(value, dict):
        return value["value"] if "value" in value else value["steps"]
    return value


def shown(value: Any, how: str) -> str:
    """A value in a format."""
    if how in ("time", "MiB"):
        return time(bare(value)) if how == "time" else mebibytes(bare(value))
    form = FORMAT.match(how)
    if form is None:
        raise ValueError(f"no format: {how}")
    by = float(int(form["base"] or 1) ** int(form["power"] or 1))
    by = 1 / by if form["sign"] == "/" else by
    said = format(bare(value) * by if form["sign"] else bare(value), form["spec"])
    if form["interval"] is None:
        return said
    low, high = sorted((value["low"] * by, value["high"] * by))
    spec = form["spec"].replace("+", "")
    if form["interval"] == "±":
        return f"{said} ± {(high - low) / 2:{spec}}"
    return f"{said} [{low:{spec}}, {high:{spec}}]"


def cell(file: str, path: str, spec: str) -> str:
    """What a table says: a number, its interval, a word, or that there is none."""
    key = path.rpartition("/")[2]
    try:
        value = value_of(file, path)
    except KeyError as missing:
        if missing.args[0] != key:  # there is no such row
            raise
        return "-"
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return value if isinstance(value, str) else shown(value, spec)
    if "not_computed" in value:
        return "not computed"
    if "reached" in value:
        what, within = ("seconds", "within_seconds") if key == "ut" else ("steps", "within")
        return shown(value[what], spec) if value["reached"] else f"> {shown(value[within], spec)}"
    return shown(value, f"{spec} ±" if "low" in value else spec)


def table(match: re.Match[str]) -> str:
    """A table with its cells."""
    if match["path"] is None:
        page = report(match["file"], "results.md").strip()
        return f"{match['open']}\n{page}\n\n{match['close']}"
    head, rule, *lines = match["said"].strip().splitlines()
    columns = [COLUMN.fullmatch(c).groups() for c in match["columns"].split(" ; ")]  # type: ignore[union-attr]
    by = [row.rsplit(" ", 1) for row in match["rows"].split(" ; ")] if match["rows"] else None
    rows = [head, rule]
    for i, line in enumerate(lines):
        cells = [c.strip() for c in line.strip().removeprefix("|").removesuffix("|").split("|")]
        labels = head.count("|") - 1 - len(columns)
        cells += [""] * (labels + len(columns) - len(cells))
        key, form = by[i] if by else (cells[0], None)
        for c, (column, own) in enumerate(columns, labels):
            if column != "-":
                path = (match["path"] + column).replace("{}", key)
                cells[c] = cell(match["file"], path, form or own)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([match["open"], *rows, "", match["close"]])


def filled(page: str) -> str:
    """A page with its figures and tables."""
    page = TABLE.sub(table, page)
    return FIGURE.sub(lambda m: f"{m[1]}{text(m['file'], m['path'], m['format'])}<!--/-->", page)


def wrong(page: Path) -> list[str]:
    """What is not as it should be on a page."""
    said = page.read_text(encoding="utf-8")
    found = [
        f"{page.name}: {m['file']}: {m['path']} is {now}, not {m['said']}"
        for m in FIGURE.finditer(said)
        if (now := text(m["file"], m["path"], m["format"])) != m["said"]
    ]
    for m in TABLE.finditer(said):
        as_it_is, lines = m[0].splitlines(), table(m).splitlines()
        found += [
            f"{page.name}: not of {m['file']}: {line}" for line in as_it_is if line not in lines
        ]
        if as_it_is != lines and not found:
            found.append(f"{page.name}: the table of {m['file']} has other lines")
    for pattern, opening in ((FIGURE, "<!--="), (TABLE, "<!--table=")):
        if len(pattern.findall(said)) != said.count(opening):
            found.append(f"{page.name}: a {opening} is not written as docs/figures.py says")
    found += [
        f"{page.name}: a line begins with a comment: {line}"
        for line in said.splitlines()
        if line.lstrip().startswith("<!--") and not re.fullmatch("<!--/?table.*-->", line)
    ]
    return found


def main() -> None:
    if "--check" in sys.argv[1:]:
        found = [line for page in PAGES for line in wrong(page)]
        print("\n".join(found) or "every figure is as its JSON says")
        raise SystemExit(bool(found))
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
