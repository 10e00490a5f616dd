"""Writing so that nothing half-written is ever taken for a result."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ._extras import require
from .errors import InputError
from .modules import tensor_hash

__all__ = [
    "check_free",
    "load_tensors",
    "locked",
    "need_disk",
    "not_finite",
    "replacing",
    "replacing_folder",
    "save_tensors",
    "sync",
    "tensor_hash",
    "writable",
]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends without an error.

    Raises:
        OSError: no space, no permission, ...; an old file at `path` stands.
    """
    path = Path(path)
    host = "".join(c for c in socket.gethostname() if c.isalnum() or c == "-")
    # a folder, for writers that make temporary files of their own
    work = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.tmp"):
            if not _alive(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        try:
            work.mkdir(exist_ok=True)
            temporary = work / path.name
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def replacing_folder(
    path: str | os.PathLike[str], resume: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A folder beside `path`, which takes its place when the block ends without an error:
    `path` is a whole result or none, and an old one stands until then.

    Args:
        resume: what identifies the work (JSON). The folder is empty at first, but where an
            interrupted block with an equal `resume` left one, that is handed out again.

    Raises:
        RuntimeError: another process is writing `path`.
        OSError: no space, no permission, ...
    """
    path = Path(path).resolve()  # the target of a link, not the link
    work, old, lock = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old", "lock"))
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, path):
            if old.exists() and not path.exists():  # a kill between the two renames below
                old.rename(path)
            shutil.rmtree(old, ignore_errors=True)
            text = json.dumps(resume, sort_keys=True)
            mark = work / ".resume.json"
            if resume is None or not mark.is_file() or mark.read_text() != text:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                if resume is not None:
                    mark.write_text(text)
            try:
                yield work
                mark.unlink(missing_ok=True)
                for file in (*work.rglob("*"), work):
                    sync(file)
            except Exception:
                if resume is None:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            if path.exists():
                path.rename(old)
            work.rename(path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)


_SPACE = ": free some space, or give a path on another disk"
_PERMISSION = ": give a path that this user may write to"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _PERMISSION),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), ": a file is where a folder should be"),
    errno.EIO: ": the disk fails, give a path on another one",
}


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Where the block cannot write `path` or beside it, the OSError names it and the remedy."""
    try:
        yield
    except OSError as error:
        said = str(error.strerror)
        about = [error.filename] if isinstance(error.filename, str) else []
        here = os.path.abspath(path.parent)
        elsewhere = any(os.path.commonpath([here, os.path.abspath(f)]) != here for f in about)
        if error.errno not in REMEDIES or elsewhere or said.startswith("cannot write "):
            raise
        raise OSError(
            error.errno,
            f"cannot write {path} ({', '.join([said, *about])}){REMEDIES[error.errno]}. What was "
            "there before is untouched",
        ) from error


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder: a rename alone may get there
    before what it renames."""
    if os.name == "nt":  # which syncs nothing that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: str) -> bool:
    """False where a process of this machine has surely ended."""
    if os.name == "nt" or not pid.isdigit():  # where a signal 0 is no question
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold `lock`, which goes with its process; where the system has no such locks, do without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as f:
        for left in reversed(range(20)):  # a second, for one that only cleans up
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not left:
                    raise RuntimeError(
                        f"{path} is being written by another process; wait for it, or give "
                        "another path"
                    ) from error
            time.sleep(0.05)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a safetensors file; `meta` goes into its metadata as JSON under the key "meta".

    Raises:
        ValueError: NaN or Inf in a tensor, which would be kept for good; nothing is written.
    """
    safetensors = require("safetensors.torch", "diffusion")
    if bad := not_finite(tensors):
        raise ValueError(
            f"{path} is not written: {bad}. The model that made it has diverged, or its precision "
            "is too small for it: look at its weights, or use float32"
        )
    with replacing(path) as temporary:
        try:
            safetensors.save_file(
                {k: v.detach().contiguous().cpu() for k, v in tensors.items()},
                temporary,
                metadata={"meta": json.dumps(meta, sort_keys=True)},
            )
        except require("safetensors", "diffusion").SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Which tensor and row of it hold NaN or Inf; empty where none does."""
    for name, t in tensors.items():
        # aminmax takes no copy; both are NaN where one value is
        if not t.is_floating_point() or not t.numel() or all(x.isfinite() for x in t.aminmax()):
            continue
        rows = (~t.isfinite()).reshape(len(t) if t.dim() else 1, -1).any(1).nonzero().flatten()
        more = f" and {len(rows) - 1} more of {len(t)}" if len(rows) > 1 else ""
        return f"{name}[{int(rows[0])}]{more} holds NaN or Inf"
    return ""


def load_tensors(
    path: str | os.PathLike[str], *, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote: the tensors and `meta`.

    Args:
        finite: whether NaN and Inf are refused, which earlier versions wrote.

    Raises:
        FileNotFoundError, ValueError: no file; no whole one; NaN or Inf in it.
    """
    safetensors = require("safetensors", "diffusion")
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            meta = (f.metadata() or {}).get("meta", "{}")
            names = list(f.keys())
            tensors = {k: f.get_tensor(k) for k in names}
            found = json.loads(meta)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): delete it and make it again"
        ) from error
    if finite and (bad := not_finite(tensors)):
        raise ValueError(f"{path}: {bad}, so that it is of no use: delete it and make it again")
    return tensors, found


def check_free(out: Path, is_result: Callable[[Path], bool], overwrite: bool) -> None:
    """Refuse to begin what would overwrite a result, or something that is none.

    Args:
        out: the output folder of a script with ``--output_dir`` and ``--overwrite``.
        is_result: whether a folder is a finished result of that script.
        overwrite: whether one may be replaced.

    Raises:
        InputError: the folder holds a result and `overwrite` is not given, or something else.
    """
    if not out.exists():
        return
    finished = is_result(out)
    if finished and not overwrite:
        raise InputError(
            f"{out} holds a finished result: give --overwrite to replace it, or another "
            "--output_dir"
        )
    if not finished and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} is in use by something else (no result of this script): give another "
            "--output_dir"
        )


def need_disk(folder: Path, size: float, what: str) -> None:
    """Refuse to begin what does not fit on the disk; `size` in bytes, an estimate."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size:
        raise InputError(
            f"{folder} needs about {size / 1e9:.2f} GB for {what}, and the disk has "
            f"{free / 1e9:.2f} GB left: free some space, or give another folder"
        )
