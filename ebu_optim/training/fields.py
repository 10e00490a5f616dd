"""Fields of a config: the name, the arguments and the help of a flag."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import InputError


def option(default: Any = MISSING, *, help: str | None = None, **more: Any) -> Any:
    """Define a field of a config and its flag.

    Args:
        default: the default; without one the flag is required. A list or dict is copied for every
            config.
        more: arguments of ``add_argument``, such as `choices` or `nargs`; `flag`, the flag's name
            or names if not the field's name; `exclusive`, the name of a group of flags of which
            only one can be given; `positional`, the name in the help of a field without a flag;
            `elsewhere`, a value that other commands take -> why this one does not.
    """
    said = {"help": help, **more}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=said)
    return field(default=default, metadata=said)


def named(config: Any, field: str) -> str:
    """The name of a config's field on the command line, for messages."""
    return name_of(next(f for f in fields(config) if f.name == field))


def name_of(f: Field[Any]) -> str:
    return f.metadata.get("positional") or flag_of(f)


def names_of(f: Field[Any]) -> tuple[str, ...]:
    given = f.metadata.get("flag", f"--{f.name}")
    return (given,) if isinstance(given, str) else tuple(given)


def flag_of(f: Field[Any]) -> str:
    """The long name of a field's flag."""
    return names_of(f)[-1]


def key_of(f: Field[Any]) -> str:
    """The field's name in a file of options, which is its flag without dashes."""
    return f.name if "positional" in f.metadata else flag_of(f).lstrip("-")


def default_of(f: Field[Any]) -> Any:
    """The field's default; MISSING for a required field."""
    return f.default_factory() if f.default_factory is not MISSING else f.default


def kind_of(hint: Any) -> type:
    """The type that a type hint stands for: list, bool or another one."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not types.NoneType)
    return get_origin(hint) or hint


def argument_of(f: Field[Any], kind: Any) -> dict[str, Any]:
    """The arguments of ``add_argument`` for a field's type and default."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not types.NoneType)
    default = default_of(f)
    said: dict[str, Any] = {"default": None if default is MISSING else default}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is list:
        said["nargs"], (kind,) = "+", get_args(kind)
    if get_origin(kind) is Literal:
        said["choices"], kind = get_args(kind), str
    return {**said, "type": dict if get_origin(kind) is dict else kind}


def flags(config: Any) -> list[str]:
    """The shortest command line of a config: the options that differ from their defaults."""
    first: list[str] = []
    found: list[str] = []
    for f in fields(config):
        value, name = getattr(config, f.name), flag_of(f)
        if "positional" in f.metadata:
            first += map(str, value if isinstance(value, list) else [value])
            continue
        default = default_of(f)
        if value is True:
            found.append(name)
        elif value != default and value is not None:
            texts = [json.dumps(value)] if isinstance(value, dict) else value
            found += [name, *map(str, texts if isinstance(texts, list) else [texts])]
    return [*first, *found]


def as_dict(config: Any) -> dict[str, Any]:
    """Field name -> value."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def as_yaml(config: Any) -> str:
    """The options that are not None as YAML, which ``--config`` reads."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    given = {key_of(f): getattr(config, f.name) for f in fields(config)}
    said = {name: plain(value) for name, value in given.items() if value is not None}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def check_choices(config: type, values: Mapping[str, Any]) -> None:
    """Check values against the choices of a config's options, as the command line does.

    Raises:
        InputError: a value is not among the choices of its option.
    """
    hints = get_type_hints(config)
    for f in fields(config):
        choices = {**argument_of(f, hints[f.name]), **f.metadata}.get("choices")
        value = values.get(f.name)
        for one in value if isinstance(value, list) else [value]:
            if choices and one is not None and one not in choices:
                if why := f.metadata.get("elsewhere", {}).get(one):
                    raise InputError(f"{flag_of(f)} {one}: {why}")
                raise InputError(
                    f"{flag_of(f)} must be one of {', '.join(map(str, choices))}; got {one}"
                )


def at_least(config: Any, least: int, *names: str) -> None:
    """Check that options are not less than a value; None passes.

    Raises:
        InputError: an option of these names is less.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"--{name} must be >= {least}; got {value}")
