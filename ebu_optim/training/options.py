"""A run's options: a frozen dataclass, and the command line that it has.

    @dataclass(frozen=True, kw_only=True)
    class Sampling(TrainingOptions):
        images: int = option(500, help="of each class")

        def __post_init__(self) -> None:
            self.check_training()

    config = parse(Sampling, description=__doc__)

The command line is argparse's: flags are the fields' names; an error is one line, the status 2.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import DDIMScheduler
from diffusers.optimization import SchedulerType, get_scheduler

from ..errors import InputError

Config = TypeVar("Config")
#: Of diffusers, but for the one that wants rules beside.
SCHEDULES = [s.value for s in SchedulerType if s is not SchedulerType.PIECEWISE_CONSTANT]


def option(default: Any = MISSING, *, help: str | None = None, **more: Any) -> Any:
    """A field of a config, and what its flag says.

    Args:
        default: without one the flag is required; a list or dict is copied for every config.
        more: what ``add_argument`` takes, such as `choices` or `nargs`; `flag`, where it is not
            the field's name; `exclusive`, a name for flags of which one can be given.
    """
    said = {"help": help, **more}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=said)
    return field(default=default, metadata=said)


def parse(
    config: type[Config], argv: Sequence[str] | None = None, description: str | None = None
) -> Config:
    """The config of a command line; None: the one of this process.

    A ``list[T]`` takes several values, a ``Literal`` one of its own, a ``dict`` JSON, a ``bool`` is
    a switch. A base class with an attribute `group` has its flags under that title in ``--help``.

    Raises:
        SystemExit: with status 2, flags that are not understood.
        InputError: values that the config itself refuses.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    add_flags(parser, config)
    return config(**vars(parser.parse_args(argv)))


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the flags of a config to a parser."""
    hints = get_type_hints(config)
    places: dict[str | None, Any] = {None: parser}
    for f in fields(config):
        said = {k: v for k, v in f.metadata.items() if k != "flag"}
        group = _group(config, f.name)
        if group not in places:
            places[group] = parser.add_argument_group(group)
        place = places[group]
        if one := said.pop("exclusive", None):
            if one not in places:
                places[one] = place.add_mutually_exclusive_group()
            place = places[one]
        place.add_argument(_flag(f), dest=f.name, **{**_argument(f, hints[f.name]), **said})


def _flag(f: Field[Any]) -> str:
    return str(f.metadata.get("flag", f"--{f.name}"))


def _group(config: type, name: str) -> str | None:
    """The title of the class that brought the field."""
    first = next(c for c in reversed(config.__mro__) if name in inspect.get_annotations(c))
    return vars(first).get("group")


def _argument(f: Field[Any], kind: Any) -> dict[str, Any]:
    """What ``add_argument`` is told of a field's type and default."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(a for a in get_args(kind) if a is not types.NoneType)
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    said: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is list:
        said["nargs"], (kind,) = "+", get_args(kind)
    if get_origin(kind) is Literal:
        said["choices"], kind = get_args(kind), str
    return {**said, "type": json.loads if get_origin(kind) is dict else kind}


def flags(config: Any) -> list[str]:
    """The shortest command line of a config: what is not as by default."""
    found: list[str] = []
    for f in fields(config):
        value, name = getattr(config, f.name), _flag(f)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value is True:
            found.append(name)
        elif value != default and value is not None:
            texts = [json.dumps(value)] if isinstance(value, dict) else value
            found += [name, *map(str, texts if isinstance(texts, list) else [texts])]
    return found


def as_dict(config: Any) -> dict[str, Any]:
    """The options by name, as they are."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


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
    argv: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Run `function` with the `config` of the command line, as a script does; `argv`: not of this
    process. What the user can put right is printed in one line, with exit status 2."""
    resumes = issubclass(config, TrainingOptions)
    exit_on_input_errors(
        lambda: function(parse(config, argv, description)),
        "--resume_from_checkpoint latest" if resumes else "the same command",
    )


def exit_on_input_errors(main: Callable[[], object], goes_on: str = "the same command") -> None:
    """Run `main`; what the user can put right is printed in one line, with exit status 2. A
    character that the console does not know is printed as another, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        what = str(error).partition("\n")[0]
        print(
            f"{Path(sys.argv[0]).name}: error: {what}\nA smaller batch takes less, and so do "
            "--gradient_checkpointing and --mixed_precision bf16, where the script has them. "
            f"Where something else filled the memory, {goes_on} goes on",
            file=sys.stderr,
        )
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}. {goes_on} goes on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {goes_on} goes on", file=sys.stderr)
        sys.exit(130)
