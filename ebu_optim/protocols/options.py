"""The options of `ebu evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..errors import InputError
from ..text_to_image.pipelines import Model
from ..training.fields import at_least, option
from .judges import ONE_FILE, SEVERAL
from .named import named
from .protocol import Protocol, Sampling

#: The options that only a model in one file has, reset for other models.
_NOT_A_FILE = dict.fromkeys(("architecture", "prediction_type", "vae", "lora"))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Model):
    """The models and the protocols to evaluate.

    Raises:
        InputError: a protocol, file or change does not exist; a protocol lacks a file; the
            forgotten concept is not a target of a protocol.
    """

    group: ClassVar[str] = "model"

    pretrained_model_name_or_path: list[str] = option(  # type: ignore[assignment]
        positional="MODEL",
        nargs="*",
        help="Models: hub ids, folders, .safetensors files, folders of changed tensors, or LoRAs.",
    )
    base: str | None = option(
        None,
        help="The model before it forgot. It is evaluated too, and changed tensors and LoRAs are "
        "put into it.",
    )
    protocol: list[str] = option(help="Names of protocols; docs/protocols.md lists them.")
    forget: list[str] = option([], help="The forgotten concept: a style, a class, an artist.")
    files: list[str] = option(
        [],
        metavar="NAME=FILE",
        help="Prompt lists, weights of judges and real images that a protocol needs, each as "
        "NAME=FILE.",
    )
    change: list[str] = option(
        [],
        metavar="KEY=VALUE",
        help="Change the sampling, each as KEY=VALUE: sampler, steps, guidance, size, noise or "
        "dtype. The label of every figure names the change.",
    )
    only: bool = option(False, help="Evaluate the models without their base.")
    first: int | None = option(
        None, help="Generate only this many images of each protocol. The label names the number."
    )
    sample_batch_size: int = option(4, help="Images that are generated at once.")
    output_dir: Path = option(
        flag=("-o", "--output_dir"), help="Folder for the images and protocols.json."
    )
    plan: bool = option(
        False, help="Print which images the run would generate and what it would cost, then stop."
    )

    @cached_property
    def protocols(self) -> list[Protocol]:
        """The protocols, with the changes of --change and --resolution."""
        values = changes(self.change)
        if self.resolution is not None:
            values["size"] = self.resolution
        return [
            replace(p, sampling=replace(p.sampling, **values))
            for p in map(named, dict.fromkeys(self.protocol))
        ]

    @cached_property
    def given(self) -> dict[str, Path]:
        """Name -> file, from --files."""
        pairs = [word.partition("=") for word in self.files]
        return {name: Path(file) for name, _, file in pairs}

    def models(self) -> dict[str, Model]:
        """Name -> model; the base is first."""
        before = [] if self.only else [self.base]
        names = dict.fromkeys([*filter(None, before), *self.pretrained_model_name_or_path])
        own = {f.name: getattr(self, f.name) for f in fields(Model)} | {"resolution": None}
        found = {}
        for name in names:
            mine = {**own, "pretrained_model_name_or_path": name}
            if not Path(name).is_file():
                mine |= _NOT_A_FILE
            if Path(name).exists():
                mine |= {"revision": None}
            found[name] = Model(**mine)
        return found

    def __post_init__(self) -> None:
        if not self.models():
            raise InputError("MODEL is missing: give a model, or only a --base")
        at_least(self, 1, "first", "sample_batch_size")
        known = {name for p in self.protocols for name in p.needs}
        for judge in (j for p in self.protocols for j in p.judges):
            known |= {*SEVERAL.get(judge, (ONE_FILE.get(judge, judge),))}
        for name, file in self.given.items():
            if name not in known:
                raise InputError(
                    f"--files {name}=...: these protocols only read {', '.join(sorted(known))}"
                )
            if not file.exists():
                raise InputError(f"--files {name}={file}: there is no such file")
        for p in self.protocols:
            p.targets(self.forget)
            if p.sampling.noise == "cuda" and not torch.cuda.is_available():
                raise InputError(
                    f"--protocol {p.name} samples its noise with a CUDA generator, and this "
                    "machine has no CUDA device: give --change noise=cpu, which generates other "
                    "images and changes the label"
                )
            for name, what in p.needs.items():
                if name not in self.given:
                    raise InputError(f"--protocol {p.name} needs {what}: give --files {name}=FILE")


def changes(words: Sequence[str]) -> dict[str, Any]:
    """The values of --change as fields of `Sampling`.

    Raises:
        InputError: a key is unknown, or a value is out of range.
    """
    choices = {
        "sampler": ("lms", "ddim", "pndm", "dpm", "flow"),
        "noise": ("cpu", "cuda"),
        "dtype": ("float32", "float16"),
    }
    known = [f.name for f in fields(Sampling)]
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise InputError(
                f"--change {word!r}: give KEY=VALUE, where KEY is one of {', '.join(known)}"
            )
        if name in choices:
            if value not in choices[name]:
                raise InputError(
                    f"--change {word!r}: {name} must be one of {', '.join(choices[name])}"
                )
            found[name] = value
            continue
        try:
            number = float(value) if name == "guidance" else int(value)
        except ValueError as error:
            raise InputError(f"--change {word!r}: {value!r} is not a number") from error
        if number < (0 if name == "guidance" else 1):
            raise InputError(
                f"--change {word!r}: {name} must be >= {0 if name == 'guidance' else 1}"
            )
        found[name] = number
    return found
