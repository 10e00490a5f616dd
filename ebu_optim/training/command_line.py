"""The command line of a config, a frozen dataclass.

    @dataclass(frozen=True, kw_only=True)
    class Sampling(TrainingOptions):
        images: int = option(500, help="Images of each class.")

        def __post_init__(self) -> None:
            self.check_training()

    config = parse(Sampling, description=__doc__)

It uses jsonargparse: flags are the fields' names, and ``--config run.yaml`` sets any of them by
name. An error is one line, with exit status 2.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import jsonargparse
import torch

from ..errors import InputError
from ..files import REMEDIES
from . import yaml_files
from .fields import argument_of, flag_of, key_of, kind_of, name_of, names_of
from .options import TrainingOptions

Config = TypeVar("Config")
#: What a field says about itself that is no argument of ``add_argument``.
APART = ("flag", "positional", "elsewhere")


def parse(
    config: type[Config],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> Config:
    """Parse a command line into a config.

    A ``list[T]`` takes several values, a ``Literal`` one of its values, a ``dict`` takes JSON, and
    a ``bool`` is a switch. ``--config`` takes a YAML file of fields; later flags override it. In
    ``--help`` the flags of a base class with an attribute `group` are under that title. An
    attribute `titles` of the config, title -> names of fields, overrides this, and its groups come
    first.

    Args:
        argv: the arguments; None takes those of this process.

    Raises:
        SystemExit: with status 2, for unknown flags or values of a wrong type.
        InputError: the config itself rejects the values.
    """
    wanted: Any = config
    required = [f for f in fields(wanted) if f.default is f.default_factory is MISSING]
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=_Wrapped,
        exit_on_error=False,
        usage=f"%(prog)s {' '.join(map(_asked, required))} [options]",
    )
    parser.add_argument("--config", action="config", help="A YAML file of options by name.")
    add_flags(parser, config)
    words = sys.argv[1:] if argv is None else list(argv)
    hints = get_type_hints(config)
    kinds = {key_of(f): kind_of(hints[f.name]) for f in fields(wanted)}
    try:
        for before, word in zip(["", *words], words, strict=False):
            if before == "--config" or word.startswith("--config="):
                yaml_files.check(word.removeprefix("--config="), kinds)
        found = vars(parser.parse_args(words))
    except (argparse.ArgumentError, InputError) as error:
        _refuse(parser, _said(config, str(error)))
    if missing := [f for f in required if found.get(key_of(f)) is None]:
        first = any("positional" in f.metadata for f in missing)
        _refuse(
            parser,
            f"the following arguments are required: {', '.join(map(name_of, missing))}"
            + "; arguments without a flag come before the options" * first,
        )
    return config(**{f.name: _typed(f, hints[f.name], found[key_of(f)]) for f in fields(wanted)})


class _Wrapped(argparse.RawDescriptionHelpFormatter):
    """Wraps each line of a help text separately, which keeps line breaks."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [short for line in text.splitlines() for short in textwrap.wrap(line, width) or [""]]


def _typed(f: Field[Any], hint: Any, value: Any) -> Any:
    """The value with its type; a positional argument is text until here, see `add_flags`."""
    if "positional" not in f.metadata:
        return value
    kind = argument_of(f, hint)["type"]
    return [kind(v) for v in value] if isinstance(value, list) else kind(value)


def _said(config: Any, why: str) -> str:
    """jsonargparse's message with the option's name on the command line, without Python's types."""
    names = {key_of(f): name_of(f) for f in fields(config)}
    for f in fields(config):
        for value, reason in f.metadata.get("elsewhere", {}).items():
            if why.startswith(f"argument {name_of(f)}: invalid choice: {value!r}"):
                return f"{name_of(f)} {value}: {reason}"
    why = re.sub(r'Parser key "(\w+)"', lambda m: f"argument {names.get(m[1], '--' + m[1])}", why)
    return re.sub(r"a <class '(\w+)'>", r"\1", why)


def _refuse(parser: Any, why: str) -> NoReturn:
    print(f"{parser.prog}: error: {' '.join(why.split())}", file=sys.stderr)
    raise SystemExit(2)


def add_flags(parser: Any, config: type) -> None:
    """Add the flags of a config to a parser. A missing required option is None or absent."""
    hints = get_type_hints(config)
    places: dict[str | None, Any] = {None: parser}
    # a group appears where its first flag is added
    first = [name for names in getattr(config, "titles", {}).values() for name in names]
    place_of = {name: i - len(first) for i, name in enumerate(first)}
    for f in sorted(fields(config), key=lambda f: place_of.get(f.name, 0)):
        said = {k: v for k, v in f.metadata.items() if k not in APART}
        group = _group(config, f.name)
        if group not in places:
            places[group] = parser.add_argument_group(group)
        place = places[group]
        if one := said.pop("exclusive", None):
            if one not in places:
                places[one] = place.add_mutually_exclusive_group()
            place = places[one]
        how = {**argument_of(f, hints[f.name]), **said}
        if name := f.metadata.get("positional"):
            # A default would override the value from --config. With a type jsonargparse would
            # check the default.
            how |= {"nargs": "*" if "nargs" in how else "?", "default": argparse.SUPPRESS}
            how.pop("type")
            parser.add_argument(f.name, metavar=name, **how)
        else:
            how["help"] = _with_default(how.get("help"), how.get("default"))
            place.add_argument(*names_of(f), dest=key_of(f), **how)


def _with_default(said: str | None, default: Any) -> str | None:
    if default in (None, "", [], {}) or "default:" in (said or "").lower():
        return said
    words = map(str, default if isinstance(default, list) else [default])
    return " ".join([*([said] if said else []), f"Default: {' '.join(words)}."])


def _asked(f: Field[Any]) -> str:
    """A required field in the usage line."""
    if name := f.metadata.get("positional"):
        return f"{name} [{name} ...]" if str(f.type).startswith("list") else name
    return f"{names_of(f)[0]} {f.metadata.get('metavar') or flag_of(f).lstrip('-').upper()}"


def _group(config: type, name: str) -> str | None:
    """The title of a field's group: from the config's `titles`, else from the class that defines
    the field."""
    for title, names in getattr(config, "titles", {}).items():
        if name in names:
            return title
    first = next(c for c in reversed(config.__mro__) if name in inspect.get_annotations(c))
    return vars(first).get("group")


def command(
    function: Callable[[Any], object],
    config: type,
    description: str | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Run `function` with the config of the command line, as a script does.

    See `exit_on_input_errors` for errors.

    Args:
        argv: the arguments; None takes those of this process.
    """
    resumes = issubclass(config, TrainingOptions)
    exit_on_input_errors(
        lambda: function(parse(config, argv, description, prog)),
        "the same command" + " with --resume_from_checkpoint latest" * resumes,
        prog,
    )


def exit_on_input_errors(
    main: Callable[[], object], goes_on: str = "the same command", prog: str | None = None
) -> None:
    """Run `main`, and print errors that the user can fix in one line, with exit status 2.

    Characters that the console cannot encode are printed as escapes.

    Args:
        goes_on: the command that continues the run, for messages.
    """
    prog = prog or Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        what = str(error).partition("\n")[0]
        print(
            f"{prog}: error: {what}\nA smaller batch needs less memory, and so do "
            "--gradient_checkpointing and --mixed_precision bf16, if the script has them. "
            f"If another program filled the memory, {goes_on} continues",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        print(f"{prog}: error: {error}. Then {goes_on} continues", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {goes_on} continues", file=sys.stderr)
        sys.exit(130)
