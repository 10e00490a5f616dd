"""Weights and packages of the judges, or the reason why a figure was not computed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..files import load_tensors
from .naming import name_of

SECONDS = 30.0  # that a download may be silent


class NotComputed(RuntimeError):
    """Weights or a package are not available here. This is not an error of the caller."""


def needed(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise a :class:`NotComputed` that names the extra to install."""
    try:
        return require(module, extra)
    except ImportError as error:
        raise NotComputed(str(error)) from error


def read_weights(
    path: str | os.PathLike[str], argument: str, inside: str = ""
) -> dict[str, Tensor]:
    """Return a state dict from a .safetensors file, or from a torch file read with weights_only.

    Args:
        inside: the key under which a torch file may hold the state dict next to other things.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no state dict.
    """
    path, argument = Path(path), name_of(argument)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}: no file {path}; give the path of a weights file, or None to download it"
        )
    if path.suffix == ".safetensors":
        return load_tensors(path, finite=False)[0]  # an attention mask may hold -inf
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that it did not write
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{argument}: {path} is not a complete weights file ({type(error).__name__}: "
            f"{reason}); get it again"
        ) from error
    if inside and isinstance(state, dict):
        state = state.get(inside, state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"{argument}: {path} holds no state dict, no names with tensors; give another file"
        )
    return state


def torchvision_weights(
    weights: Any, file: str | os.PathLike[str] | None, argument: str, progress: bool
) -> dict[str, Tensor]:
    """Return the state dict of a torchvision weights entry from `file`, the cache or a download."""
    if file is not None:
        return read_weights(file, argument)
    name = weights.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        if not path.is_file():
            _check_online()
        with _timeout(SECONDS):
            state: dict[str, Tensor] = weights.get_state_dict(
                progress=progress, check_hash=True, map_location="cpu", weights_only=True
            )
    except OSError as error:  # URLError, HTTPError, a full disk
        raise NotComputed(
            f"the weights {name} could not be downloaded ({error}); give {name_of(argument)}=, or "
            f"put the file of {weights.url} at {path}"
        ) from error
    except Exception as error:  # the download ended early (the hash), or the cached file is damaged
        reason = str(error).strip().partition("\n")[0]
        raise NotComputed(
            f"{path} is not a complete weights file ({type(error).__name__}: {reason}); delete it, "
            "and it is downloaded again"
        ) from error
    return state


def _check_online() -> None:
    """Raises ConnectionError if HF_HUB_OFFLINE says that nothing may be downloaded."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ConnectionError("HF_HUB_OFFLINE is set")


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Inside the block, a connection that says nothing for `seconds` raises TimeoutError. torch.hub
    would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_into(model: torch.nn.Module, state: dict[str, Tensor], argument: str) -> None:
    """Load a state dict strictly; a ValueError says in one line what does not fit."""
    own = model.state_dict()
    lacking = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k, v in own.items() if k in state and state[k].shape != v.shape]
    if lacking or wrong:
        k = (lacking or wrong)[0]
        found = "is missing" if lacking else f"is {tuple(state[k].shape)}"
        raise ValueError(
            f"{name_of(argument)} does not hold weights of {type(model).__name__}: {k}, which is "
            f"{tuple(own[k].shape)}, {found}"
        )
    model.load_state_dict(state)
