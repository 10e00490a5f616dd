"""Writing so that nothing half-written is ever taken for a result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ._extras import require


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its place when the block ends without an error:
    `path` is a whole result or none, and an old one stands until then.

    Raises:
        RuntimeError: another process is writing `path`.
    """
    path = Path(path).resolve()  # the target of a link, not the link
    work, old, lock = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old", "lock"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, path):
        if old.exists() and not path.exists():  # a kill between the two renames below
            old.rename(path)
        for folder in (work, old):
            shutil.rmtree(folder, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        except Exception:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        work.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold `lock`, which goes with its process; where the system has no such locks, do without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"{path} is being written by another process; wait for it, or give another path"
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a safetensors file; `meta` goes into its metadata as JSON under the key "meta"."""
    safetensors = require("safetensors.torch", "diffusion")
    with replacing(path) as temporary:
        safetensors.save_file(
            {k: v.detach().contiguous().cpu() for k, v in tensors.items()},
            temporary,
            metadata={"meta": json.dumps(meta, sort_keys=True)},
        )


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: the tensors and `meta`."""
    safetensors = require("safetensors", "diffusion")
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            meta = (f.metadata() or {}).get("meta", "{}")
            names = list(f.keys())
            return {k: f.get_tensor(k) for k in names}, json.loads(meta)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): delete it and make it again"
        ) from error
