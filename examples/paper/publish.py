"""Copy finished reports to where the documentation has them: figures, tables, plots, no weights.

python examples/paper/publish.py outputs/paper/digits/table6-full-replay docs/results/digits
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import command_line

from ebu_optim.files import replacing_folder

PARTS = ("results.json", "results.md", "plots", "pictures", "along.gif")
LARGEST = 5_000_000  # bytes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("reports", type=Path, nargs="+", help="folders that a script wrote")
    parser.add_argument("to", type=Path)
    args = parser.parse_args(argv)
    names = [report.name for report in args.reports]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise command_line.InputError(
            f"several reports are called {', '.join(twice)}: one would replace the other; publish "
            "each world into a folder of its own"
        )
    for report in args.reports:
        try:
            json.loads((report / "results.json").read_text())
        except (OSError, ValueError) as error:
            raise command_line.InputError(f"{report} holds no report: {error}") from error
        files = [f for part in PARTS for f in (report / part, *(report / part).rglob("*"))]
        size = sum(f.stat().st_size for f in files if f.is_file())
        if size > LARGEST:
            raise command_line.InputError(f"{report} has {size / 1e6:.1f} MB; at most 5 are kept")
        with replacing_folder(args.to / report.name) as work:
            for part in PARTS:
                source = report / part
                if source.is_dir():
                    shutil.copytree(source, work / part)
                elif source.exists():
                    shutil.copy(source, work / part)
        print(f"{report} -> {args.to / report.name}")


if __name__ == "__main__":
    command_line.main(main)
