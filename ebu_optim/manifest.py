"""Hashes of what a result was made from: the key that it is kept under, and what changed since.

A manifest is a mapping from the name of an input ("unet", "prompts", "images", ...) to a hash of
its content. Sets, images, the Fisher, runs and reports are kept under the inputs that they depend
on. A hash covers the content of a file and not its path, so a file may be moved.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from .errors import InputError
from .modules import model_hash

LENGTH = 16  # hex digits of a key


def digest(said: Any) -> str:
    """Return the SHA-256, in hexadecimal, of a value that can be written as JSON.

    The order of a mapping's keys does not count, a tuple equals a list, and of a path only the
    name counts.
    """
    text = json.dumps(said, sort_keys=True, default=lambda path: Path(path).name)
    return hashlib.sha256(text.encode()).hexdigest()


def key(*what: Any) -> str:
    """Return the first 16 hex digits of the :func:`digest` of all values together."""
    return digest(what)[:LENGTH]


def contents(files: Iterable[Path]) -> str:
    """Return 16 hex digits over the names and bytes of files."""
    return key([[file.name, sha256(file)] for file in sorted(files)])


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    The hash is cached as long as the size and the modification time of the file stay the same.
    """
    found = file.stat()
    return _hashed(str(file.resolve()), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hashed(file: str, size: int, changed: int) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            found.update(block)
    return found.hexdigest()


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what a model's computation depends on apart from its weights.

    These are the settings in its configuration, or in those of its parts, that differ from the
    defaults of their class. So a newer library with more settings does not change the result.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile changes no setting
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):  # transformers
        return plain(config.to_diff_dict())
    if isinstance(config, Mapping):  # diffusers
        defaults = {
            name: p.default
            for name, p in inspect.signature(type(model).__init__).parameters.items()
        }
        return {k: v for k, v in plain(config).items() if v != plain({k: defaults.get(k)}).get(k)}
    found = {name: config_of(part) for name, part in model.named_children()}
    return {name: part for name, part in found.items() if part}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as JSON.

    Entries about where, by whom and in which precision it was saved are left out.
    """
    said = {"transformers_version", "torch_dtype", "dtype", "architectures"}
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in said}
    return json.loads(json.dumps(kept, default=str))


def of_model(model: nn.Module) -> str:
    """Return 16 hex digits over the weights and the configuration of a model."""
    return key(model_hash(model), config_of(model))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the inputs that differ; an input in only one of the two counts too."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def refuse_changed(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise InputError if inputs changed since `what` was begun; the message names them.

    Args:
        before: the manifest when `what` was begun.
        now: the manifest now.
        what: the name of the work, in the message.
    """
    if names := changed(before, now):
        each = "; ".join(f"{n}: {before.get(n)} then, {now.get(n)} now" for n in names)
        raise InputError(f"{what} was begun with another {', '.join(names)} ({each})")
