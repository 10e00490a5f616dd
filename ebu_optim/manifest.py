"""What a thing is made of, by content: under which key it is kept, and what changed since.

A manifest is a mapping from the name of an input ("unet", "prompts", "images", ...) to a hash of
its content. Sets, pictures, the Fisher, runs and reports are kept under the part that they depend
on. A path is no content: where a file lies changes nothing, what is in it does.
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
    """The SHA-256, in hexadecimal, of what can be written as JSON: the order of a mapping's keys
    changes nothing, a tuple is a list, of a path its name alone counts, not where it lies."""
    text = json.dumps(said, sort_keys=True, default=lambda path: Path(path).name)
    return hashlib.sha256(text.encode()).hexdigest()


def key(*what: Any) -> str:
    """16 hex digits over what can be written as JSON; see :func:`digest`."""
    return digest(what)[:LENGTH]


def contents(files: Iterable[Path]) -> str:
    """Of files, by their names and bytes; 16 hex digits."""
    return key([[file.name, sha256(file)] for file in sorted(files)])


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal; read once as long as its size and time stay."""
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
    """What a model computes with beside its weights: the settings of its configuration, or of its
    parts', that are not their class's defaults. So a newer library, which knows more settings,
    makes no other model of it."""
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
    """A configuration as JSON holds it, without what says where it was saved, by whom and in which
    precision."""
    said = {"transformers_version", "torch_dtype", "dtype", "architectures"}
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in said}
    return json.loads(json.dumps(kept, default=str))


def of_model(model: nn.Module) -> str:
    """Of the weights and of the configuration; 16 hex digits."""
    return key(model_hash(model), config_of(model))


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that are not as they were; what only one of them knows is another."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def refuse_changed(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raises:
    InputError: inputs are not as they were when `what` was begun; it names them.
    """
    if names := changed(before, now):
        each = "; ".join(f"{n}: {before.get(n)} then, {now.get(n)} now" for n in names)
        raise InputError(f"{what} was begun with another {', '.join(names)} ({each})")
