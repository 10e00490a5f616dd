"""Runs as data: existing runs are reused, missing ones are made.

A run is a sequence of tasks. Each writes a folder whose name ends in a hash of its options, which
include the folders that it builds on. Other options therefore give another run. An interrupted run
continues where it stopped.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..errors import InputError
from ..manifest import digest
from ..training.fields import check_choices, flags
from ..training.options import TrainingOptions

Options = Mapping[str, Any]


class Maker(NamedTuple):
    """A function ``make(config)`` that writes the output folder or file of its config.

    Args:
        make: a function at the top level of a module.
        config: its frozen dataclass. With a config of training, a task resumes from its newest
            checkpoint.
        last: the file that is written last.
    """

    make: Callable[[Any], object]
    config: type
    last: str


class Task(NamedTuple):
    """A call of `maker` with `options`, which do not include the output, that writes `folder`."""

    maker: Maker
    options: Options
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / self.maker.last).is_file()

    @property
    def config(self) -> Any:
        """The maker's config.

        Raises:
            InputError: the config lacks an option, or rejects a value.
        """
        kinds = {f.name: str(f.type) for f in fields(self.maker.config)}
        if unknown := [name for name in self.options if name not in kinds]:
            raise InputError(
                f"{self.maker.make.__name__} takes no option {', '.join(unknown)}; see the fields "
                f"of {self.maker.config.__name__}"
            )
        own: dict[str, Any] = {"output_dir": self.folder}
        if "output" in kinds:
            own = {"output": self.folder / self.maker.last}
        if issubclass(self.maker.config, TrainingOptions):
            own["resume_from_checkpoint"] = "latest"
        given = {
            name: v if "Path" in kinds[name] else _as_text(v) for name, v in self.options.items()
        }
        check_choices(self.maker.config, given)
        return self.maker.config(**given, **own)


def _as_text(value: Any) -> Any:
    """Paths as text, for options that can also be a hub id or a prompt."""
    if isinstance(value, list):
        return [_as_text(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def task(
    maker: Maker,
    options: Options,
    root: Path,
    name: str,
    where: Options | None = None,
    of: Sequence[str] = (),
) -> Task:
    """A task with the folder root/name-<hash of the maker, the options and `of`>.

    Args:
        where: further options that do not change the hash, such as places of data.
        of: further values for the hash, such as the folders that the task builds on. For a path
            in the options only its name counts.
    """
    key = digest([maker.make.__name__, *of, options])[:8]
    return Task(maker, {**options, **(where or {})}, root / f"{name}-{key}")


class Run(NamedTuple):
    """A sequence of tasks.

    Attributes:
        seconds: the estimated time on one CPU core, or on the GPU.
        steps: the number of training steps.
        after: the names of runs that must be finished before.
    """

    name: str
    tasks: tuple[Task, ...]
    seconds: float
    steps: int
    after: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return all(t.done for t in self.tasks)

    @property
    def folder(self) -> Path:
        return self.tasks[-1].folder


class Failed(InputError):
    """Some runs failed; the message has the error of each."""


def cost(runs: Sequence[Run], workers: int, basis: str) -> str:
    """The remaining work, in words."""
    todo = [r for r in runs if not r.done]
    hours = sum(r.seconds for r in todo) / workers / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{max(hours * 60, 1):.0f} min"
    return (
        f"{len(runs)} runs, {len(runs) - len(todo)} of them there already; to do: {len(todo)} with "
        f"{sum(r.steps for r in todo):,} training steps, about {time} with {workers} at a time "
        f"({basis})"
    )


def execute(runs: Sequence[Run], workers: int) -> None:
    """Make the missing runs, `workers` at a time, each in a process with its share of the cores.

    Raises:
        ValueError: two different runs have the same name.
        Failed: some runs failed. All runs that do not depend on them were finished first.
    """
    todo = {r.name: r for r in runs if not r.done}
    if clash := [r.name for r in runs if r.name in todo and todo[r.name] != r]:
        raise ValueError(f"two different runs have the same name: {', '.join(clash)}")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // workers))
    failed: dict[str, str] = {}
    bar = tqdm(total=round(sum(r.seconds for r in todo.values())), unit="s of work", smoothing=0.1)
    context = multiprocessing.get_context("spawn")
    os.environ["TQDM_DISABLE"] = "1"  # only affects the workers, which import tqdm after this
    # processes are reused, as importing torch and diffusers takes as long as a short run
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
            if not running:  # all ready runs depend on failed ones
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
            "command continues"
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this worker when its parent was killed; a pool's worker would wait for ever.

    What is written is complete or absent, and the same command continues."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(run: Run) -> str | None:
    """Make the missing tasks, with their output in <folder>.log; returns the error in one line."""
    import traceback

    from accelerate.state import AcceleratorState, GradientState

    for t in run.tasks:
        if t.done:
            continue
        t.folder.parent.mkdir(parents=True, exist_ok=True)
        log = t.folder.with_name(t.folder.name + ".log")
        with open(log, "a", buffering=1) as f:
            out, err = sys.stdout, sys.stderr
            sys.stdout = sys.stderr = f
            # accelerate keeps both per process, so the precision of an earlier run would remain
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            try:
                config = t.config
                print(f"{t.maker.make.__name__} {' '.join(flags(config))}")
                t.maker.make(config)
            except Exception as error:
                traceback.print_exc(file=f)
                first = str(error).splitlines()[:1]
                return f"{type(error).__name__}: {' '.join(first)} (see {log})"
            finally:
                sys.stdout, sys.stderr = out, err
        shutil.rmtree(t.folder / "checkpoints", ignore_errors=True)  # not needed any more
    return None
