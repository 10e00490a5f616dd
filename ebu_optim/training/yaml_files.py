"""The file of --config, looked at before it is taken: for a wrong type in it the parser has no
words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


def check(path: str, kinds: Mapping[str, type]) -> None:
    """Args:
        kinds: name of an option -> list, bool or anything else, which is the parser's to check.

    Raises:
        InputError: no file, no YAML of options by name; one that does not exist; no list, or no
            true or false, where there is to be one.
    """
    told = f"--config {path}"
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{told} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{told} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict):
        raise InputError(f"{told} has no options by name, such as max_train_steps: 1000")
    for name, value in said.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{told}: there is no option {name}{hint}")
        if value is None:
            continue
        if kinds[name] is list and not (isinstance(value, list) and all(map(_plain, value))):
            raise InputError(f"{told}: {name} is a list, such as [{name}]; got {value!r}")
        if kinds[name] is bool and not isinstance(value, bool):
            raise InputError(f"{told}: {name} is true or false; got {value!r}")


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))
