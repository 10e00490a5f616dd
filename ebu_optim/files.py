"""Writing files and folders so that nothing half-written is ever taken for a result."""

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
    """Yield a temporary path next to `path`; rename it to `path` if the block ends without error.

    Raises:
        OSError: no space, no permission, ...; an old file at `path` is kept.
    """
    path = Path(path)
    host = "".join(c for c in socket.gethostname() if c.isalnum() or c == "-")
    # a folder, because some writers make temporary files next to their output
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
    """Yield a folder next to `path` that replaces `path` if the block ends without error.

    `path` is always a whole result or absent. An old result stays until the new one is complete.

    Args:
        resume: what identifies the work (JSON). The folder is empty, unless a block with an equal
            `resume` was interrupted: then that block's folder is yielded again.

    Raises:
        RuntimeError: another process is writing `path`.
        OSError: no space, no permission, ...
    """
    path = Path(path).resolve()  # the target of a link, not the link
    work, old, lock = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old", "lock"))
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, path):
            if old.exists() and not path.exists():  # killed between the two renames below
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


_SPACE = "; free some space, or give a path on another disk"
_PERMISSION = "; give a path that this user may write to"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _PERMISSION),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "; remove the file that is where a folder goes"),
    errno.EIO: "; the disk fails, give a path on another one",
}


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Make the OSError of a failed write name `path` and the remedy."""
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
            f"cannot write {path} ({', '.join([said, *about])}){REMEDIES[error.errno]}. The "
            "previous content is unchanged",
        ) from error


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk.

    Without this, a rename may reach the disk before the file that it renames.
    """
    if os.name == "nt":  # Windows cannot sync a file that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: str) -> bool:
    """Return False if the process with this id on this machine has certainly ended."""
    if os.name == "nt" or not pid.isdigit():  # on Windows, signal 0 does not test a process
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
    """Hold the lock file `lock`, which the system frees when the process ends.

    On a system without such locks the block runs unlocked.

    Raises:
        RuntimeError: another process holds the lock and so writes `path`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as f:
        for left in reversed(range(20)):  # one second: the other process may only be cleaning up
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
        ValueError: a tensor holds NaN or Inf. Nothing is written.
    """
    safetensors = require("safetensors.torch", "diffusion")
    if bad := not_finite(tensors):
        raise ValueError(
            f"{path} is not written: {bad}. The model that made this tensor has diverged, or its "
            "precision is too small; check the model's weights, or use float32"
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
    """Name the first tensor and row that hold NaN or Inf; empty if all values are finite."""
    for name, t in tensors.items():
        # aminmax makes no copy; both of its values are NaN if any value is
        if not t.is_floating_point() or not t.numel() or all(x.isfinite() for x in t.aminmax()):
            continue
        rows = (~t.isfinite()).reshape(len(t) if t.dim() else 1, -1).any(1).nonzero().flatten()
        more = f" and {len(rows) - 1} more of {len(t)}" if len(rows) > 1 else ""
        return f"{name}[{int(rows[0])}]{more} holds NaN or Inf"
    return ""


def load_tensors(
    path: str | os.PathLike[str], *, finite: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the `meta` that `save_tensors` wrote.

    Args:
        finite: raise ValueError if a tensor holds NaN or Inf. Earlier versions wrote such files.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is incomplete, or `finite` is set and a tensor holds NaN or Inf.
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
            f"{path} is not a complete safetensors file ({error}); delete it and make it again"
        ) from error
    if finite and (bad := not_finite(tensors)):
        raise ValueError(f"{path}: {bad}, so it cannot be used; delete it and make it again")
    return tensors, found


def check_free(out: Path, is_result: Callable[[Path], bool], overwrite: bool) -> None:
    """Raise InputError if a run would overwrite a result or a folder that something else uses.

    Args:
        out: the output folder of a script with ``--output_dir`` and ``--overwrite``.
        is_result: returns whether a folder is a finished result of that script.
        overwrite: whether a finished result may be replaced.

    Raises:
        InputError: the folder holds a result and `overwrite` is False, or it holds something else.
    """
    if not out.exists():
        return
    finished = is_result(out)
    if finished and not overwrite:
        raise InputError(
            f"{out} holds a finished result; give --overwrite to replace it, or another "
            "--output_dir"
        )
    if not finished and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"{out} is in use by something else (it holds no result of this script); give another "
            "--output_dir"
        )


def need_disk(folder: Path, size: float, what: str) -> None:
    """Raise InputError if the disk has fewer free bytes than `size`, an estimate."""
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < size:
        raise InputError(
            f"{folder} needs about {size / 1e9:.2f} GB for {what}, and the disk has "
            f"{free / 1e9:.2f} GB free; free some space, or give another folder"
        )
