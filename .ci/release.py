"""Rehearses a release: every step of .github/workflows/release.yml that needs no account.

`python .ci/release.py` compares the versions, builds the source distribution and from it the pure
wheel and this platform's, checks their metadata and size, and tries each wheel where nothing of the
repository is on the path. `--tag vX.Y.Z` only compares the versions, as the workflow does first.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 5_000_000  # bytes of a file: the digits' models and the prompts are most of today's 1.5 MB


def versions() -> dict[str, str]:
    """Where a version stands, and which one stands there."""
    found = {}
    for file, pattern in {
        "ebu_optim/__init__.py": r'__version__ = "(.+)"',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## (\d\S*) - \d{4}-\d\d-\d\d$",
    }.items():
        match = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        found[file] = match[1] if match else "none"
    return found


def compare(tag: str | None) -> None:
    found = versions() | ({"the tag": tag.removeprefix("v")} if tag else {})
    if len(set(found.values())) > 1:
        raise SystemExit(f"A release has one version, and here are several: {found}.")
    print("version", *set(found.values()))


def run(*command: object, cwd: Path = ROOT, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, **environment}, check=True)


def build(into: Path) -> list[Path]:
    """The source distribution; the pure wheel and this platform's, built from it."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", into)
    (source,) = into.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(into / "unpacked", filter="data")
    (unpacked,) = (into / "unpacked").iterdir()
    for pure in "10":
        wheel = (sys.executable, "-m", "build", "--wheel", "--outdir", into, unpacked)
        run(*wheel, EBU_OPTIM_PURE=pure)
    made = [source, *into.glob("*.whl")]
    if len(made) != 3:
        raise SystemExit(f"A source distribution and two wheels were wanted, there are {made}.")
    return made


def try_wheel(wheel: Path, into: Path) -> None:
    """Imports the wheel from a folder of its own, and steps with its kernels."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", into, wheel)
    if wheel.name.endswith("-none-any.whl"):
        code = "import ebu_optim as e; print(e.__file__, e.__version__, e.kernels.active())"
        run(sys.executable, "-c", code, cwd=into, PYTHONPATH=str(into))
    else:
        run(sys.executable, ROOT / ".ci" / "try_wheel.py", cwd=into, PYTHONPATH=str(into))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", help="Only compare the versions with this tag, vX.Y.Z.")
    tag = parser.parse_args().tag
    compare(tag)
    if tag:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder))
        run(
            "twine",
            "check",
            "--strict",
            *made,
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        for file in made:
            print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
            if file.stat().st_size > LIMIT:
                raise SystemExit(
                    f"{file.name} is larger than {LIMIT / 1e6:.0f} MB: see what is in it."
                )
        for wheel in made[1:]:
            try_wheel(wheel, Path(folder) / wheel.stem)
    print("What is left needs accounts: see 'Releases' in CONTRIBUTING.md.")


if __name__ == "__main__":
    main()
