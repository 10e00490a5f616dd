"""Fill the figures of the pages from the JSON files that they come from.

    python docs/figures.py            # write them
    python docs/figures.py --check    # name those that are not what the JSON says; exit status 1

A figure stands between two comments:

    <!--=evidence.json: runs/#count ; d-->352<!--/-->

The file is in docs/evidence, or it is a report in docs/results (`digits/table6-full-replay`). The
path goes down by keys, and by

    [method=joint,options/gamma!=100]  the one item of a list of which this is true
    *[method=joint]  or  *             every such item: the rest of the path is applied to each
    #count #sum #mean #sd #min #max    last, of many

The format is Python's; `/ 2**30` or `* 100` after it scales the value first. A line must not begin
with a comment, which Markdown would take for a block of HTML.
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
PAGES = sorted(DOCS.glob("*.md"))
FIGURE = re.compile(
    r"(<!--=(?P<file>[^:]+): (?P<path>.+?) ; (?P<format>.+?)-->)(?P<said>.*?)(<!--/-->)", re.DOTALL
)
SCALE = re.compile(r"^(?P<spec>\S+)(?: (?P<sign>[*/]) (?P<base>\d+)(?:\*\*(?P<power>\d+))?)?$")
OF_MANY: dict[str, Callable[[list[Any]], Any]] = {
    "#count": len,
    "#sum": sum,
    "#mean": statistics.mean,
    "#sd": statistics.stdev,
    "#min": min,
    "#max": max,
}


@cache
def content(name: str) -> Any:
    """A JSON file of docs/evidence, or a report of docs/results."""
    file = DOCS / "evidence" / name
    if file.suffix != ".json":
        file = DOCS / "results" / name / "results.json"
    return json.loads(file.read_text(encoding="utf-8"))


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


def text(file: str, path: str, how: str) -> str:
    """A figure as the page shows it."""
    value = look_up(content(file), path)
    if isinstance(value, dict):  # of a report: a value with its interval
        value = value["value"]
    scale = SCALE.match(how)
    if scale is None:
        raise ValueError(f"no format: {how}")
    if scale["sign"]:
        by = int(scale["base"]) ** int(scale["power"] or 1)
        value = value * by if scale["sign"] == "*" else value / by
    return format(value, scale["spec"])


def filled(page: str) -> str:
    """A page with its figures."""
    return FIGURE.sub(lambda m: f"{m[1]}{text(m['file'], m['path'], m['format'])}<!--/-->", page)


def wrong(page: Path) -> list[str]:
    """What is not as it should be on a page."""
    said = page.read_text(encoding="utf-8")
    found = [
        f"{page.name}: {m['file']}: {m['path']} is {now}, not {m['said']}"
        for m in FIGURE.finditer(said)
        if (now := text(m["file"], m["path"], m["format"])) != m["said"]
    ]
    if len(FIGURE.findall(said)) != said.count("<!--="):
        found.append(f"{page.name}: a figure is not written as docs/figures.py says")
    found += [
        f"{page.name}: a line begins with a comment: {line}"
        for line in said.splitlines()
        if line.lstrip().startswith("<!--")
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
