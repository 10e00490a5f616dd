"""The files of a checkpoint: written completely or not at all, and verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import __version__
from ..files import locked, replacing_folder, writable

FORMAT = 1  # a reader refuses newer formats
MANIFEST = "manifest.json"


class Unusable(ValueError):
    """A checkpoint that cannot be loaded: it is `damaged`, or a newer version wrote it."""

    def __init__(self, path: Path, text: str, damaged: bool = True) -> None:
        super().__init__(text)
        self.path, self.damaged = path, damaged


class _Hashing:
    """A file that hashes what is written, and keeps the OSError that torch's writer hides."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha.update(data)
        self.size += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, step: int, states: Mapping[str, Any], keep: int | None) -> None:
    folder = path.parent
    with writable(path):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", folder):
            later = [p for p in checkpoints(folder) if _step(p) > step]
            if later:
                raise ValueError(
                    f"{folder} holds {later[-1].name}, a later step than {step}; load it first, "
                    "delete it, or give another folder"
                )
            _tidy(folder)
            with replacing_folder(path) as work:
                files = {f"{name}.pt": _write_file(work, name, s) for name, s in states.items()}
                manifest = {
                    "format": FORMAT,
                    "ebu_optim": __version__,
                    "torch": torch.__version__,
                    "step": step,
                    "files": files,
                }
                manifest["sha256"] = _digest(manifest)
                (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
            older = checkpoints(folder)[: -keep if keep else 0]
            for p in older:  # renamed first, so that no reader sees a half-deleted checkpoint
                gone = p.with_name(f".{p.name}.partial")
                with suppress(OSError):
                    p.rename(gone)
                    shutil.rmtree(gone)


def _write_file(work: Path, name: str, state: Any) -> dict[str, Any]:
    with open(work / f"{name}.pt", "wb") as f:
        file = _Hashing(f)
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except Exception as error:
            if file.error is None:
                raise
            raise file.error from error
    return {"sha256": file.sha.hexdigest(), "bytes": file.size}


def clean(path: Path) -> None:
    """Remove leftovers of killed saves, unless another process is saving."""
    folder = path.parent if _step(path) >= 0 else path
    # without locks it is unknown whether another process is saving
    if os.name != "nt" and any(folder.glob(".step_*.*")):
        with suppress(OSError, RuntimeError), locked(folder / ".lock", folder):
            _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove leftovers of killed saves; a checkpoint that was being replaced gets its name back."""
    for p in folder.glob(".step_*.*"):
        name, end = p.name[1:].rsplit(".", 1)
        if end == "old" and not (folder / name).exists():
            p.rename(folder / name)
        elif end == "lock":
            p.unlink(missing_ok=True)
        else:
            shutil.rmtree(p, ignore_errors=True)


def _step(path: Path) -> int:
    """Return the step of a checkpoint from its name, -1 for any other path."""
    match = re.fullmatch(r"\.step_(\d+)\.old|step_(\d+)", path.name)
    return int(match[1] or match[2]) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, ordered by step.

    If a process was killed while it replaced a checkpoint, the old one is returned under its
    temporary name.
    """
    if not folder.exists():
        return []
    by_step: dict[int, Path] = {}
    for p in sorted(folder.iterdir()):  # the hidden ones first
        if _step(p) >= 0:
            by_step[_step(p)] = p
    return [by_step[step] for step in sorted(by_step)]


def read_newest(
    path: Path, names: Sequence[str], fallback: bool, damaged: list[Unusable]
) -> tuple[Path, int, dict[str, Any]] | None:
    one = _step(path) >= 0 or (path / MANIFEST).exists()
    if one and not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; latest_checkpoint(folder) names the newest"
        )
    found = [path] if one else checkpoints(path)
    for checkpoint in reversed(found):
        try:
            return _read(checkpoint, names)
        except Unusable as error:
            damaged.append(error)
            if not (fallback and error.damaged):
                break
    if not damaged:
        return None
    last = damaged[-1]
    older = [p for p in checkpoints(last.path.parent) if _step(p) < _step(last.path)]
    whole = next((p for p in reversed(older) if _is_whole(p)), None)
    raise ValueError(
        f"{'; '.join(map(str, damaged))}. "
        + (
            f"The newest complete checkpoint before it is {whole}; load that path"
            if whole
            else "There is no complete checkpoint before it; start again in another folder"
        )
        + (", or give fallback=True" if whole and last.damaged and not one else "")
        + ". Nothing was changed"
    ) from last


def _read(checkpoint: Path, names: Sequence[str]) -> tuple[Path, int, dict[str, Any]]:
    manifest = _read_manifest(checkpoint)
    states = {}
    for name in names:
        if f"{name}.pt" not in manifest["files"]:
            there = ", ".join(f.removesuffix(".pt") for f in manifest["files"])
            raise ValueError(
                f"{checkpoint} holds no {name!r}; it holds {there}. Nothing was changed"
            )
        _verify(checkpoint, f"{name}.pt", manifest)
        try:
            states[name] = torch.load(
                checkpoint / f"{name}.pt", map_location="cpu", weights_only=True
            )
        except Exception as error:
            raise Unusable(
                checkpoint,
                f"{checkpoint / name}.pt is as torch {manifest['torch']} wrote it, but "
                f"torch {torch.__version__} cannot read it ({error})",
                damaged=False,
            ) from error
    return checkpoint, manifest["step"], states


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        newer = manifest["format"] > FORMAT
        whole = manifest.pop("sha256") == _digest(manifest)
    except Exception as error:
        raise Unusable(checkpoint, f"{file} is damaged ({error!r})") from error
    if newer:
        raise Unusable(
            checkpoint,
            f"{checkpoint} has format {manifest['format']}, written by ebu_optim "
            f"{manifest.get('ebu_optim')}; this version, {__version__}, reads up to {FORMAT}; "
            "install a newer version",
            damaged=False,
        )
    if not whole:
        raise Unusable(checkpoint, f"{file} is damaged: its content has changed")
    return manifest


def _verify(checkpoint: Path, name: str, manifest: Mapping[str, Any]) -> None:
    file, expected = checkpoint / name, manifest["files"][name]
    sha = hashlib.sha256()
    try:
        size = file.stat().st_size
        with open(file, "rb") as f:
            while chunk := f.read(1 << 20):
                sha.update(chunk)
    except OSError as error:
        raise Unusable(checkpoint, f"{file} cannot be read ({error})") from error
    if size != expected["bytes"]:
        raise Unusable(
            checkpoint, f"{file} is damaged: {size} bytes, {expected['bytes']} were written"
        )
    if sha.hexdigest() != expected["sha256"]:
        raise Unusable(checkpoint, f"{file} is damaged: its SHA-256 differs from the saved one")


def _is_whole(checkpoint: Path) -> bool:
    try:
        manifest = _read_manifest(checkpoint)
        for name in manifest["files"]:
            _verify(checkpoint, name, manifest)
    except Unusable:
        return False
    return True


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
