"""Runs of the scripts of examples/: what is there is reused, what is missing is run.

A run is a few commands in an order. Each writes a folder whose name ends in a hash of its options,
and so of the folders that it builds on: with other options it is another run. An interrupted run
goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

EXAMPLES = Path(__file__).resolve().parent.parent
SD = "stable_diffusion"
LAST = {  # what each script writes last
    "train": "README.md", "train_classifier": "classifier.json", "prepare": "fisher.safetensors",
    "unlearn": "README.md", "evaluate": "results.json", "shapes": "README.md",
    f"{SD}/world/train": "pipeline/world.json", f"{SD}/world/judges": "style.safetensors",
    f"{SD}/world/measure": "measured.json", f"{SD}/unlearn": "unlearn.json",
    f"{SD}/attack": "attacks.json", f"{SD}/evaluate": "evaluation.json",
}  # fmt: skip
RESUMES = ("train", "train_classifier", "unlearn", f"{SD}/world/train", f"{SD}/world/judges",
           f"{SD}/unlearn")  # fmt: skip
#: Scripts that are told the file which they write, and not a folder.
WRITES_FILE = (f"{SD}/world/measure",)


class Command(NamedTuple):
    """`script` of examples/, of its ddpm/ or of this folder where it names none, with `options`,
    all but --output_dir, which is `folder`."""

    script: str
    options: tuple[str, ...]
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / LAST[self.script]).is_file()

    @property
    def argv(self) -> list[str]:
        resume = ["--resume_from_checkpoint", "latest"] if self.script in RESUMES else []
        name, path = "--output_dir", self.folder
        if self.script in WRITES_FILE:
            name, path = "--output", self.folder / LAST[self.script]
        return [*self.options, *resume, name, str(path)]

    def run(self) -> None:
        """In this process; scripts are read from their files, as some have the same name."""
        folders = ("",) if "/" in self.script else ("ddpm", "paper")
        files = (EXAMPLES / folder / f"{self.script}.py" for folder in folders)
        file = next(f for f in files if f.is_file())
        runpy.run_path(str(file), run_name=file.stem)["main"](self.argv)


def command(
    script: str, options: Sequence[Any], root: Path, name: str, where: Sequence[Any] = (),
    of: Sequence[str] = (),
) -> Command:  # fmt: skip
    """In the folder root/name-<hash of the script, the options and `of`, what else it builds on>;
    `where` the data lie, and where `root` is, changes no hash."""
    said = [script, *of, *(o.name if isinstance(o, Path) else str(o) for o in options)]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:8]
    return Command(script, (*map(str, options), *map(str, where)), root / f"{name}-{key}")


class Run(NamedTuple):
    """Commands in an order; `seconds` of one CPU core (or of the GPU), an estimate; `steps` of
    training; `after`: the names of runs that must be done before."""

    name: str
    commands: tuple[Command, ...]
    seconds: float
    steps: int
    after: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return all(c.done for c in self.commands)

    @property
    def folder(self) -> Path:
        return self.commands[-1].folder


class Failed(Exception):
    """Runs that failed, each with the last line of its log."""


def cost(runs: Sequence[Run], workers: int, basis: str) -> str:
    """What is still to do, in words."""
    todo = [r for r in runs if not r.done]
    hours = sum(r.seconds for r in todo) / workers / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 1):.0f} min"
    return (
        f"{len(runs)} runs, {len(runs) - len(todo)} of them there already; to do: {len(todo)} with "
        f"{sum(r.steps for r in todo):,} training steps, about {time} with {workers} at a time "
        f"({basis})"
    )


def execute(runs: Sequence[Run], workers: int) -> None:
    """Run what is not done, `workers` at a time, each in a process with its share of the cores.

    Raises:
        ValueError: one name for two different runs.
        Failed: some runs failed; all that do not build on them were done first.
    """
    todo = {r.name: r for r in runs if not r.done}
    if clash := [r.name for r in runs if r.name in todo and todo[r.name] != r]:
        raise ValueError(f"one name for two different runs: {', '.join(clash)}")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers))
    failed: dict[str, str] = {}
    bar = tqdm(total=round(sum(r.seconds for r in todo.values())), unit="s of work", smoothing=0.1)
    context = multiprocessing.get_context("spawn")
    os.environ["TQDM_DISABLE"] = "1"  # read when a process imports tqdm: of the workers alone
    # processes are not renewed: importing torch and diffusers takes as long as a short run
    pool = ProcessPoolExecutor(workers, context, _start, (threads,))
    running: dict[Any, Run] = {}
    try:
        while todo or running:
            waiting = {*todo, *(r.name for r in running.values())}
            ready = [r for r in todo.values() if not waiting.intersection(r.after)]
            if not ready and not running:
                raise RuntimeError(f"runs wait for each other: {', '.join(todo)}")
            for run in ready:
                if len(running) == workers:
                    break
                del todo[run.name]
                if gone := [a for a in run.after if a in failed]:
                    failed[run.name] = f"needs {', '.join(gone)}"
                    continue
                bar.set_postfix_str(run.name)
                running[pool.submit(_work, run)] = run
            if not running:  # all that was ready needs what failed
                continue
            finished = next(as_completed(running))
            run = running.pop(finished)
            bar.update(round(run.seconds))
            if error := finished.result():
                failed[run.name] = error
    except BrokenProcessPool as error:
        names = dict.fromkeys([run.name, *(r.name for r in running.values())])
        raise Failed(
            f"a process was killed (out of memory?) while these ran: {', '.join(names)}; the same "
            "command goes on"
        ) from error
    except KeyboardInterrupt:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        bar.close()
        pool.shutdown(wait=not sys.exc_info()[0], cancel_futures=True)
    if failed:
        raise Failed("\n".join(f"{name}: {error}" for name, error in failed.items()))


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    import torch

    torch.set_num_threads(threads)


def _work(run: Run) -> str | None:
    """The commands that are missing, their output in <folder>.log; the error, in a line."""
    import traceback

    from accelerate.state import AcceleratorState, GradientState

    for c in run.commands:
        if c.done:
            continue
        c.folder.parent.mkdir(parents=True, exist_ok=True)
        log = c.folder.with_name(c.folder.name + ".log")
        with open(log, "a", buffering=1) as f:
            print(f"$ {c.script}.py {' '.join(c.argv)}", file=f)
            out, err = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = f
            # a process keeps both: a run without --mixed_precision would have the one before's
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            try:
                c.run()
            except Exception as error:
                traceback.print_exc(file=f)
                first = str(error).splitlines()[:1]
                return f"{type(error).__name__}: {' '.join(first)} (see {log})"
            except SystemExit:  # argparse; what it said is in the log
                return f"{c.script}.py does not take these options (see {log})"
            finally:
                sys.stdout, sys.stderr = out, err
        shutil.rmtree(c.folder / "checkpoints", ignore_errors=True)  # what is done is not resumed
    return None
