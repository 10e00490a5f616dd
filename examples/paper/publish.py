"""Copy finished reports into the documentation: figures, tables and plots, but no weights.

python examples/paper/publish.py --reports outputs/paper/digits/table6-full-replay \\
    --to docs/results/digits
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ebu_optim.errors import InputError
from ebu_optim.files import replacing_folder
from ebu_optim.training import command, option

PARTS = (
    "results.json",
    "results.md",
    "index.html",
    "compared.csv",
    "plots",
    "pictures",
    "along.gif",
)
LARGEST = 5_000_000  # bytes


@dataclass(frozen=True, kw_only=True)
class Publish:
    reports: list[Path] = option(help="Reports: output folders of the scripts.")
    to: Path = option(help="Folder to copy them to.")


def main(args: Publish) -> None:
    names = [report.name for report in args.reports]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(
            f"several reports are called {', '.join(twice)}: one would replace the other; publish "
            "each world into its own folder"
        )
    for report in args.reports:
        try:
            json.loads((report / "results.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{report} has no report: {error}") from error
        files = [f for part in PARTS for f in (report / part, *(report / part).rglob("*"))]
        size = sum(f.stat().st_size for f in files if f.is_file())
        if size > LARGEST:
            raise InputError(f"{report} has {size / 1e6:.1f} MB; at most 5 can be published")
        with replacing_folder(args.to / report.name) as work:
            for part in PARTS:
                source = report / part
                if source.is_dir():
                    shutil.copytree(source, work / part)
                elif source.exists():
                    shutil.copy(source, work / part)
        print(f"{report} -> {args.to / report.name}")


if __name__ == "__main__":
    command(main, Publish, __doc__)
