"""Checkpoints of a whole run. A kill at any moment loses nothing that was complete.

A checkpoint is a folder ``step_00000120`` with one file per object, written by torch.save and read
with ``weights_only=True``, and ``manifest.json``: format, versions, step, SHA-256 and size of every
file. It is written under another name, synced and renamed. So a folder with that name is complete.
"""

from __future__ import annotations

import operator
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import _files as files
from . import _run_state as run

__all__ = ["latest_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, objects: Mapping[str, Any], *, keep: int | None = 2
) -> Path:
    """Save `objects` and the random states of torch, CUDA, NumPy and Python as ``folder/step_...``.

    Call it between two steps, outside the phases. Checkpoints older than the last `keep` are
    deleted when the new one is complete, so the disk needs room for one more. Leftovers of a killed
    call are removed by the next call, or by :func:`load_checkpoint`. Under torch.distributed every
    rank calls it; rank 0 writes the objects and every rank's random states.

    Args:
        folder: the folder of this run; created if it does not exist.
        step: number of steps done so far.
        objects: by name: objects with ``state_dict`` and ``load_state_dict`` (model, optimizer,
            scheduler, GradScaler), torch.Generators, and dicts of tensors and plain values.
        keep: number of checkpoints to keep; None keeps all.

    Returns:
        The path of the new checkpoint.

    Raises:
        OSError: no space, no permission, ...; the older checkpoints are unchanged.
        RuntimeError: another process is saving to `folder`; on other ranks, rank 0's error.
        TypeError: an object has no state, holds shards, or needs pickle to be read back.
        ValueError: a name, step or `keep` is not valid, or `folder` holds a later step. Nothing was
            written.
    """
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step must be the number of steps done, >= 0; got {step}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be >= 1, or None to keep all; got {keep}")
    states = {}
    for name, item in run.named(objects).items():
        states[name] = run.get(item)
        run.check_plain(name, states[name])
    path = Path(folder) / f"step_{step:08d}"
    states[run.RANDOM] = _gather(run.random_state())
    error = None
    if _rank() == 0:
        try:
            files.write(path, step, states, keep)
        except (OSError, RuntimeError, ValueError) as caught:
            error = caught
    _together(error)
    return path


def load_checkpoint(
    path: str | os.PathLike[str],
    objects: Mapping[str, Any],
    *,
    fallback: bool = False,
    random: bool = True,
) -> int:
    """Load the newest checkpoint of a folder, or the one at `path`, into `objects`.

    Every file is read and compared with the manifest before the first object is changed. If an
    object refuses its state, the objects before it get their own state back. Tensors are read to
    the CPU; the objects move them. Under torch.distributed every rank calls it, on a shared file
    system.

    Args:
        path: the folder given to :func:`save_checkpoint`, or one checkpoint in it.
        objects: as saved, or some of them; dicts are filled in place.
        fallback: if the newest checkpoint is damaged, warn, load the newest complete one, and
            rename the damaged one to ``step_....damaged``.
        random: restore the random states too.

    Returns:
        The step of the checkpoint; 0 if the folder holds no checkpoint. Then nothing was changed.

    Raises:
        FileNotFoundError: `path` names one checkpoint, which does not exist.
        ValueError: the checkpoint is damaged, has a newer format, lacks one of `objects`, or does
            not fit them. The message names the newest complete checkpoint. Nothing was changed.
        RuntimeError: another rank failed, or found another checkpoint. Nothing was changed.
    """
    live = run.named(objects)
    if random:
        live[run.RANDOM] = run.RandomStates(_rank())
    found: tuple[Path, int, dict[str, Any]] | None = None
    damaged: list[files.Unusable] = []
    error: Exception | None = None
    try:
        found = files.read_newest(Path(path), list(live), fallback, damaged)
    except (OSError, ValueError) as caught:
        error = caught
    _together(error)
    steps = _gather(found[1] if found else None)
    if any(step != steps[0] for step in steps):
        raise RuntimeError(
            f"the ranks found checkpoints of different steps in {path} (by rank: {steps}); put it "
            "on a file system that all ranks share"
        )
    if _rank() == 0:
        files.clean(Path(path))
    if found is None:
        return 0
    checkpoint, step, states = found
    before = {name: run.on_cpu(run.get(item)) for name, item in live.items()}
    try:
        for name, item in live.items():
            try:
                run.put(item, states[name])
            except Exception as caught:
                error = ValueError(
                    f"{checkpoint} does not fit the {name!r} of this run ({caught}); nothing was "
                    "changed"
                )
                error.__cause__ = caught
                break
        _together(error)
    except BaseException:
        for name, item in live.items():
            run.put(item, before[name])
        raise
    for bad in damaged:
        warnings.warn(f"{bad}. Continuing from {checkpoint}", stacklevel=2)
        if _rank() == 0:
            aside = bad.path.with_name(bad.path.name + ".damaged")
            with suppress(OSError):  # the folder may be read-only
                shutil.rmtree(aside, ignore_errors=True)
                bad.path.rename(aside)
    return step


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint in `folder` by its name, or None; its files are not read."""
    found = files.checkpoints(Path(folder))
    return found[-1] if found else None


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _grouped() else 0


def _gather(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    if not _grouped():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _together(error: Exception | None) -> None:
    """Wait for all ranks; raise if any rank has an error."""
    errors = _gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise RuntimeError(f"rank {rank}: {text}")
