"""A run's options: a frozen dataclass, and the command line that it has.

    @dataclass(frozen=True, kw_only=True)
    class Sampling(TrainingOptions):
        images: int = option(500, help="of each class")

        def __post_init__(self) -> None:
            self.check_training()

    config = parse(Sampling, description=__doc__)

The command line is jsonargparse's: flags are the fields' names, ``--config run.yaml`` gives any of
them by name; an error is one line, the status 2.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import jsonargparse
import torch
from diffusers import DDIMScheduler
from diffusers.optimization import SchedulerType, get_scheduler

from ..errors import InputError
from ..files import REMEDIES
from . import yaml_files

Config = TypeVar("Config")
#: Of diffusers, but for the one that wants rules beside.
SCHEDULES = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


def option(default: Any = MISSING, *, help: str | None = None, **more: Any) -> Any:
    """A field of a config, and what its flag says.

    Args:
        default: without one the flag is required; a list or dict is copied for every config.
        more: what ``add_argument`` takes, such as `choices` or `nargs`; `flag`, where it is not
            the field's name, or its several names; `exclusive`, a name for flags of which one can
            be given; `positional`, how the help calls a field that has no flag.
    """
    said = {"help": help, **more}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=said)
    return field(default=default, metadata=said)


def parse(
    config: type[Config], argv: Sequence[str] | None = None, description: str | None = None,
    prog: str | None = None,
) -> Config:  # fmt: skip
    """The config of a command line; None: the one of this process.

    A ``list[T]`` takes several values, a ``Literal`` one of its own, a ``dict`` JSON, a ``bool`` is
    a switch. ``--config`` takes a YAML file of fields; what follows it has the last word. A base
    class with an attribute `group` has its flags under that title in ``--help``; an attribute
    `titles` of the config, title -> names of fields, has the last word on which come first.

    Raises:
        SystemExit: with status 2, flags that are not understood.
        InputError: values that the config itself refuses.
    """
    wanted: Any = config
    required = [f for f in fields(wanted) if f.default is f.default_factory is MISSING]
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawTextHelpFormatter,
        exit_on_error=False, usage=f"%(prog)s {' '.join(map(_asked, required))} [options]",
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML of options by name")
    add_flags(parser, config)
    words = sys.argv[1:] if argv is None else list(argv)
    hints = get_type_hints(config)
    kinds = {_key(f): _kind(hints[f.name]) for f in fields(wanted)}
    try:
        for before, word in zip(["", *words], words, strict=False):
            if before == "--config" or word.startswith("--config="):
                yaml_files.check(word.removeprefix("--config="), kinds)
        found = vars(parser.parse_args(words))
    except (argparse.ArgumentError, InputError) as error:
        _refuse(parser, _said(config, str(error)))
    if missing := [f for f in required if found.get(_key(f)) is None]:
        first = any("positional" in f.metadata for f in missing)
        _refuse(
            parser, f"the following arguments are required: {', '.join(map(_name, missing))}"
            + "; what has no flag stands before the options" * first,
        )  # fmt: skip
    return config(**{f.name: _typed(f, hints[f.name], found[_key(f)]) for f in fields(wanted)})


def _typed(f: Field[Any], hint: Any, value: Any) -> Any:
    """What has no flag is a text, or texts, until here: see `add_flags`."""
    if "positional" not in f.metadata:
        return value
    kind = _argument(f, hint)["type"]
    return [kind(v) for v in value] if isinstance(value, list) else kind(value)


def _said(config: Any, why: str) -> str:
    """jsonargparse's words, by the option's name on the command line and without Python's types."""
    names = {_key(f): _name(f) for f in fields(config)}
    why = re.sub(r'Parser key "(\w+)"', lambda m: f"argument {names.get(m[1], '--' + m[1])}", why)
    return re.sub(r"a <class '(\w+)'>", r"\1", why)


def _refuse(parser: Any, why: str) -> NoReturn:
    print(f"{parser.prog}: error: {' '.join(why.split())}", file=sys.stderr)
    raise SystemExit(2)


def add_flags(parser: Any, config: type) -> None:
    """Add the flags of a config to a parser; a required one that is not given is None or absent."""
    hints = get_type_hints(config)
    places: dict[str | None, Any] = {None: parser}
    # a group stands where its first flag is added
    first = [name for names in getattr(config, "titles", {}).values() for name in names]
    place_of = {name: i - len(first) for i, name in enumerate(first)}
    for f in sorted(fields(config), key=lambda f: place_of.get(f.name, 0)):
        said = {k: v for k, v in f.metadata.items() if k not in ("flag", "positional")}
        group = _group(config, f.name)
        if group not in places:
            places[group] = parser.add_argument_group(group)
        place = places[group]
        if one := said.pop("exclusive", None):
            if one not in places:
                places[one] = place.add_mutually_exclusive_group()
            place = places[one]
        how = {**_argument(f, hints[f.name]), **said}
        if name := f.metadata.get("positional"):
            # a default would take the place of what --config says; jsonargparse checks one by type
            how |= {"nargs": "*" if "nargs" in how else "?", "default": argparse.SUPPRESS}
            how.pop("type")
            parser.add_argument(f.name, metavar=name, **how)
        else:
            how["help"] = _with_default(how.get("help"), how.get("default"))
            place.add_argument(*_names(f), dest=_key(f), **how)


def _with_default(said: str | None, default: Any) -> str | None:
    if default in (None, "", [], {}) or "default:" in (said or ""):
        return said
    words = map(str, default if isinstance(default, list) else [default])
    return "; ".join([*([said] if said else []), f"default: {' '.join(words)}"])


def _asked(f: Field[Any]) -> str:
    """A required field, as the usage has it."""
    if name := f.metadata.get("positional"):
        return f"{name} [{name} ...]" if str(f.type).startswith("list") else name
    return f"{_names(f)[0]} {f.metadata.get('metavar') or _flag(f).lstrip('-').upper()}"


def named(config: Any, field: str) -> str:
    """What a command calls a field of its config, for messages."""
    return _name(next(f for f in fields(config) if f.name == field))


def _name(f: Field[Any]) -> str:
    return f.metadata.get("positional") or _flag(f)


def _names(f: Field[Any]) -> tuple[str, ...]:
    given = f.metadata.get("flag", f"--{f.name}")
    return (given,) if isinstance(given, str) else tuple(given)


def _flag(f: Field[Any]) -> str:
    """The long name."""
    return _names(f)[-1]


def _key(f: Field[Any]) -> str:
    """Its name in a file of options: as on the command line."""
    return f.name if "positional" in f.metadata else _flag(f).lstrip("-")


def _group(config: type, name: str) -> str | None:
    """The title that the config gives it, else that of the class that brought the field."""
    for title, names in getattr(config, "titles", {}).items():
        if name in names:
            return title
    first = next(c for c in reversed(config.__mro__) if name in inspect.get_annotations(c))
    return vars(first).get("group")


def _kind(hint: Any) -> type:
    """list, bool or something else."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(a for a in get_args(hint) if a is not types.NoneType)
    return get_origin(hint) or hint


def _argument(f: Field[Any], kind: Any) -> dict[str, Any]:
    """What ``add_argument`` is told of a field's type and default."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not types.NoneType)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    said: dict[str, Any] = {"default": None if default is MISSING else default}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is list:
        said["nargs"], (kind,) = "+", get_args(kind)
    if get_origin(kind) is Literal:
        said["choices"], kind = get_args(kind), str
    return {**said, "type": dict if get_origin(kind) is dict else kind}


def flags(config: Any) -> list[str]:
    """The shortest command line of a config: what is not as by default."""
    first: list[str] = []
    found: list[str] = []
    for f in fields(config):
        value, name = getattr(config, f.name), _flag(f)
        if "positional" in f.metadata:
            first += map(str, value if isinstance(value, list) else [value])
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value is True:
            found.append(name)
        elif value != default and value is not None:
            texts = [json.dumps(value)] if isinstance(value, dict) else value
            found += [name, *map(str, texts if isinstance(texts, list) else [texts])]
    return [*first, *found]


def as_dict(config: Any) -> dict[str, Any]:
    """The options by name, as they are."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def as_yaml(config: Any) -> str:
    """What ``--config`` reads again: the options that are not None, as YAML."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    given = {_key(f): getattr(config, f.name) for f in fields(config)}
    said = {name: plain(value) for name, value in given.items() if value is not None}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def check_choices(config: type, values: Mapping[str, Any]) -> None:
    """As the command line does it, of a config's options that come from elsewhere.

    Raises:
        InputError: a value that is none of its option's choices.
    """
    hints = get_type_hints(config)
    for f in fields(config):
        choices = {**_argument(f, hints[f.name]), **f.metadata}.get("choices")
        value = values.get(f.name)
        for one in value if isinstance(value, list) else [value]:
            if choices and one is not None and one not in choices:
                raise InputError(f"{_flag(f)} {one}: there is {', '.join(map(str, choices))}")


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises:
    InputError: an option of these names is less; None passes.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise InputError(f"--{name} must be >= {least}; got {value}")


def ddim_takes(config: Any, scheduler: Any, *names: str) -> None:
    """Raises:
    InputError: an option of these names is more steps than DDIM takes on the model's schedule.
    """
    sampler = DDIMScheduler.from_config(scheduler.config)
    total = sampler.config.num_train_timesteps

    def fits(steps: int) -> bool:
        sampler.set_timesteps(steps)  # SD's steps_offset makes 1000 begin at t = 1000
        return int(sampler.timesteps.max()) < total

    for name in names:
        if (steps := getattr(config, name)) > total or not fits(steps):
            most = next((n for n in range(min(steps, total), 0, -1) if fits(n)), 0)
            raise InputError(f"--{name} must be <= {most}, the model's; got {steps}")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What every training command has, named as in diffusers' scripts."""

    group: ClassVar[str] = "training"

    output_dir: Path = option()
    overwrite_output_dir: bool = option(False, help="of an earlier run")
    seed: int = option(0)
    train_batch_size: int = option(128, help="of each process")
    max_train_steps: int = option(1000)
    learning_rate: float = option(1e-4)
    lr_scheduler: str = option("constant", choices=SCHEDULES)
    lr_warmup_steps: int = option(0)
    max_grad_norm: float = option(1.0, help="0 does not clip")
    gradient_accumulation_steps: int = option(1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None)
    cpu: bool = option(False, help="even where there is a GPU")
    checkpointing_steps: int = option(500)
    checkpoints_total_limit: int = option(2)
    resume_from_checkpoint: str | None = option(None, help='"latest", or a checkpoint\'s folder')
    report_to: str = option("none", help="tensorboard, wandb, ..., all or none")
    logging_dir: str = option("logs", help="in the output folder")
    logging_steps: int = option(10)

    def check_training(self) -> None:
        """Raises:
        InputError: numbers that cannot be.
        """
        at_least(self, 1, "train_batch_size", "max_train_steps", "gradient_accumulation_steps",
                 "checkpointing_steps", "checkpoints_total_limit", "logging_steps")  # fmt: skip
        at_least(self, 0, "lr_warmup_steps", "seed")
        if self.seed >= 2**32:
            raise InputError(f"--seed must be < {2**32}, which numpy takes; got {self.seed}")
        rate = self.learning_rate
        if rate is None:
            return
        if not 0 < rate < math.inf:
            raise InputError(f"--learning_rate must be > 0 and finite; got {rate}")
        try:
            new_schedule(self, torch.optim.SGD([torch.zeros(1)], lr=rate))
        except ValueError as error:
            raise InputError(f"--lr_scheduler {self.lr_scheduler}: {error}") from error


def new_schedule(args: Any, optimizer: Any) -> Any:
    """Stepped once an optimizer step, by hand: it is not given to accelerate."""
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps or 1,
    )  # fmt: skip


def command(
    function: Callable[[Any], object], config: type, description: str | None = None,
    argv: Sequence[str] | None = None, prog: str | None = None,
) -> None:  # fmt: skip
    """Run `function` with the `config` of the command line, as a script does; `argv`: not of this
    process. What the user can put right is printed in one line, with exit status 2."""
    resumes = issubclass(config, TrainingOptions)
    exit_on_input_errors(
        lambda: function(parse(config, argv, description, prog)),
        "the same command" + " with --resume_from_checkpoint latest" * resumes, prog,
    )  # fmt: skip


def exit_on_input_errors(
    main: Callable[[], object], goes_on: str = "the same command", prog: str | None = None
) -> None:
    """Run `main`; what the user can put right is printed in one line, with exit status 2. A
    character that the console does not know is printed as another, and ends nothing."""
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
            f"{prog}: error: {what}\nA smaller batch takes less, and so do "
            "--gradient_checkpointing and --mixed_precision bf16, where the script has them. "
            f"Where something else filled the memory, {goes_on} goes on",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        print(f"{prog}: error: {error}. Then {goes_on} goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {goes_on} goes on", file=sys.stderr)
        sys.exit(130)
