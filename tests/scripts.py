"""Scripts of examples/ in this process: importing what they need takes longer than running them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from ebu_optim.training.command_line import parse

PAPER = Path(__file__).parent.parent / "examples" / "paper"


def load(script: Path) -> ModuleType:
    """A script as a module, under a name that no other has; the same one every time."""
    name = "examples_" + "_".join(script.with_suffix("").parts[-2:])
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # where dataclasses look their names up
        spec.loader.exec_module(module)
    return sys.modules[name]


def script(name: str) -> ModuleType:
    """One of the paper's."""
    return load(PAPER / f"{name}.py")


def start(name: str, root: Path, *options) -> None:
    """Run a script of the paper's, one run at a time."""
    config = inspect.get_annotations(script(name).main, eval_str=True)["args"]
    given = ["--workers", 1, "--output_dir", root, *options]
    script(name).main(parse(config, [str(o) for o in given]))


def reset_accelerate() -> None:
    """A process keeps both: a run would have the precision and accumulation of the one before."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def by_both(script: Path, function, config) -> tuple[Path, Path]:
    """The output folders of a script's `main` and of the package's function, in one process."""
    for name, run in (("script", load(script).main), ("package", function)):
        reset_accelerate()
        run(replace(config, output_dir=config.output_dir / name))
    return config.output_dir / "script", config.output_dir / "package"


def run_script(script: Path, *args) -> tuple[int, str]:
    """Exit status and what was said."""
    reset_accelerate()
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
