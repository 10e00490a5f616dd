"""Python in processes of its own, and how long a test waits for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds. A deadline only ends a hang: what it ends takes less than a tenth of it on an idle
#: machine, and no test asserts a time. That of pytest, in pyproject.toml, comes after this one.
PATIENCE = 900


def environment(**more: str) -> dict[str, str]:
    """Ours, with the package found, one thread a process and no GPU."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def python(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` at the root of the repository, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(**environ),
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
