"""Check the file of --config before parsing, as the parser's messages for wrong types are poor."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


def check(path: str, kinds: Mapping[str, type]) -> None:
    """Check a YAML file of options.

    Args:
        kinds: name of an option -> list, bool or another type, which the parser checks.

    Raises:
        InputError: the file cannot be read or is not a YAML mapping of options; an option does not
            exist; a value must be a list, or true or false, and is not.
    """
    told = f"--config {path}"
    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{told} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{told} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(said, dict):
        raise InputError(f"{told} must map options to values, such as max_train_steps: 1000")
    for name, value in said.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise InputError(f"{told}: there is no option {name}{hint}")
        if value is None:
            continue
        if kinds[name] is list and not (isinstance(value, list) and all(map(_plain, value))):
            raise InputError(f"{told}: {name} must be a list, such as [{name}]; got {value!r}")
        if kinds[name] is bool and not isinstance(value, bool):
            raise InputError(f"{told}: {name} must be true or false; got {value!r}")


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))
