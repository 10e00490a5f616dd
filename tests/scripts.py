"""Scripts of examples/ in this process: importing what they need takes longer than running them."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def importable(folders: Sequence[Path]) -> Iterator[None]:
    """The scripts' folders on the path, and their modules gone again afterwards: other folders
    have modules of the same names."""
    before = list(sys.path)
    sys.path[:0] = [str(f) for f in folders]
    yield
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in folders:
            del sys.modules[name]


def run_script(script: Path, *args) -> tuple[int, str]:
    """Exit status and what was said."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    said, argv, path = io.StringIO(), sys.argv, list(sys.path)
    sys.argv = [str(script), *map(str, args)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = argv, path
    return code, said.getvalue()
