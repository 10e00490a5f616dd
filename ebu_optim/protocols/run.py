"""Published evaluations of text-to-image models, by name.

    ebu evaluate without/pipeline --base runwayml/stable-diffusion-v1-5 \\
        --protocol imagenette imagenette-esd --forget "cassette player" -o evaluated

Pictures are kept under a key of all that made them: a second protocol, another judge or a run that
was killed draws nothing twice. The figures are in protocols.json, each with the label of its
protocol, which says what was changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import replacing
from ..manifest import key
from ..metrics import versions
from ..text_to_image import pipelines, results
from ..text_to_image.pipelines import Model
from ..training.options import at_least, option
from .judges import Judge, open_judge
from .named import label, named
from .pictures import Pictures, read
from .protocol import Asked, Protocol, Sampling, Seen

RESULT = "protocols.json"
#: Pictures that are in memory at a time, beside the judge's own.
BATCH = 16
#: Options of a model in one file, for one that is none.
_NOT_A_FILE = dict.fromkeys(("architecture", "prediction_type", "vae", "lora"))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Model):
    """Which models, by which protocols.

    Raises:
        InputError: protocols, files or changes that are none; what is forgotten is none of theirs.
    """

    group: ClassVar[str] = "model"

    pretrained_model_name_or_path: list[str] = option(  # type: ignore[assignment]
        positional="MODEL", nargs="*",
        help="hub ids, folders, .safetensors files, folders of changed tensors or a LoRA",
    )  # fmt: skip
    base: str | None = option(
        None, help="the model before: drawn beside, and what changes and LoRAs are put into"
    )
    protocol: list[str] = option(help="names, see docs/protocols.md")
    forget: list[str] = option([], help="what is to be gone: a style, a class, an artist")
    files: list[str] = option(
        [], metavar="NAME=FILE", help="prompt lists and judges' weights that a protocol asks for"
    )
    change: list[str] = option(
        [], metavar="KEY=VALUE",
        help="of the sampling: sampler, steps, guidance, size, noise, dtype; the label says it",
    )  # fmt: skip
    first: int | None = option(None, help="only so many pictures of each; the label says it")
    sample_batch_size: int = option(4)
    output_dir: Path = option(flag=("-o", "--output_dir"))
    plan: bool = option(False, help="say what will be drawn and what it costs; do nothing")

    @cached_property
    def protocols(self) -> list[Protocol]:
        """With the changes."""
        values = changes(self.change)
        if self.resolution is not None:
            values["size"] = self.resolution
        return [
            replace(p, sampling=replace(p.sampling, **values))
            for p in map(named, dict.fromkeys(self.protocol))
        ]

    @cached_property
    def given(self) -> dict[str, Path]:
        """--files by name."""
        pairs = [word.partition("=") for word in self.files]
        return {name: Path(file) for name, _, file in pairs}

    def models(self) -> dict[str, Model]:
        """By name; the base first."""
        names = dict.fromkeys([*filter(None, [self.base]), *self.pretrained_model_name_or_path])
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
            raise InputError("MODEL: name a model, or the --base alone")
        at_least(self, 1, "first", "sample_batch_size")
        known = {name for p in self.protocols for name in (*p.needs, *p.judges)}
        for name, file in self.given.items():
            if name not in known:
                raise InputError(
                    f"--files {name}=...: these protocols read {', '.join(sorted(known))}"
                )
            if not file.is_file():
                raise InputError(f"--files {name}={file}: there is no such file")
        for p in self.protocols:
            p.targets(self.forget)
            if p.sampling.noise == "cuda" and not torch.cuda.is_available():
                raise InputError(
                    f"--protocol {p.name} takes its noise from a CUDA generator, and this machine "
                    "has none: --change noise=cpu draws other pictures, and its label says so"
                )
            for name, what in p.needs.items():
                if name not in self.given:
                    raise InputError(f"--protocol {p.name} needs {what}: give --files {name}=FILE")


def changes(words: Sequence[str]) -> dict[str, Any]:
    """--change as fields of `Sampling`.

    Raises:
        InputError: an unknown key, a value that cannot be.
    """
    choices = {
        "sampler": ("lms", "ddim", "pndm", "dpm"), "noise": ("cpu", "cuda"),
        "dtype": ("float32", "float16"),
    }  # fmt: skip
    known = [f.name for f in fields(Sampling)]
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise InputError(f"--change {word!r}: there is {', '.join(known)}, as KEY=VALUE")
        if name in choices:
            if value not in choices[name]:
                raise InputError(f"--change {word!r}: there is {', '.join(choices[name])}")
            found[name] = value
            continue
        try:
            number = float(value) if name == "guidance" else int(value)
        except ValueError as error:
            raise InputError(f"--change {word!r}: {value!r} is no number") from error
        if number < (0 if name == "guidance" else 1):
            raise InputError(f"--change {word!r} is too small")
        found[name] = number
    return found


def evaluate(args: Evaluate) -> list[dict[str, Any]]:
    """Draw, judge and count, and write the rows to ``protocols.json``.

    Returns:
        The rows of this call: model, label, figures and all that they come from.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = {p.name: p.asked(args.given)[: args.first] for p in args.protocols}
    kept = {name: _pictures(args, name, model) for name, model in args.models().items()}
    for line in plan(args, asked, kept):
        print(line)
    if args.plan:
        return []
    names = dict.fromkeys(judge for p in args.protocols for judge in p.judges)
    judges = {name: open_judge(name, args.given, device) for name in names}
    rows = []
    with results.held(args.output_dir):
        for name, pictures in kept.items():
            loaded = _Loaded(partial(results.load, args.models()[name], args.base))
            for protocol in args.protocols:
                of = asked[protocol.name]
                pipe = partial(loaded.pipeline, protocol.sampling.dtype)
                pictures.draw(protocol.sampling, of, pipe, args.sample_batch_size)
                rows.append(_row(args, protocol, of, pictures, kept.get(args.base or ""), judges))
                _write(args.output_dir / RESULT, rows[-1])
                for line in _said(rows[-1]):
                    print(line)
    print(f"saved {args.output_dir / RESULT}")
    return rows


class _Loaded:
    """A model's pipeline, opened when something is to be drawn, and once: unless its weights were
    cast to float16, which loses what they were."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._pipeline = load, None

    def pipeline(self, dtype: str) -> Any:
        found = self._load() if self._pipeline is None else self._pipeline
        self._pipeline = found if dtype == "float32" else None
        return found


def _pictures(args: Evaluate, name: str, model: Model) -> Pictures:
    pipelines.look(results.whole(model, args.base))
    return Pictures(args.output_dir / "images", results.made_of(model, args.base), name)


def plan(
    args: Evaluate, asked: Mapping[str, Sequence[Asked]], kept: Mapping[str, Pictures]
) -> Iterator[str]:
    """What will be drawn, and what it costs."""
    total = 0
    for name, pictures in kept.items():
        for p in args.protocols:
            of = asked[p.name]
            missing = len(pictures.missing(p.sampling, of))
            passes = missing * p.sampling.steps * 2
            total += passes
            called = label(p, len(of), targets=p.targets_of(args.forget))
            yield (
                f"{name}: {called}: {missing:,} of {len(of):,} pictures to draw, {passes:,} passes "
                "through the denoiser"
            )
    yield f"in all {total:,} passes through the denoiser"
    for p in args.protocols:
        yield from (f"{p.name}: {note}" for note in p.notes)


def _row(
    args: Evaluate, protocol: Protocol, asked: Sequence[Asked], pictures: Pictures,
    base: Pictures | None, judges: Mapping[str, Judge | str],
) -> dict[str, Any]:  # fmt: skip
    """A model by a protocol."""
    ours = {name: judges[name] for name in protocol.judges}
    why = {name: judge for name, judge in ours.items() if isinstance(judge, str)}
    there = {name: judge for name, judge in ours.items() if isinstance(judge, Judge)}
    for name, judge in list(there.items()):
        if judge.of_base and base is None:
            why[name] = "not computed: it compares with the base's pictures: give --base"
            del there[name]
    found = look(protocol, asked, pictures, base, there)
    targets = protocol.targets(args.forget)
    figures = protocol.count(Seen(asked, targets, found, why))
    identities = {name: judge.identity for name, judge in there.items()}
    files = [pictures.file(protocol.sampling, a).name for a in asked]
    return {
        "model": pictures.whose, "made_of": pictures.model,
        "label": label(protocol, len(asked), identities, protocol.targets_of(args.forget)),
        "protocol": {
            "name": protocol.name, "title": protocol.title, "source": protocol.source,
            "sampling": vars(protocol.sampling), "images": len(asked), "judges": identities,
            "published_judges": dict(protocol.judges), "notes": list(protocol.notes),
        },
        "forget": targets, "figures": figures,
        "pictures": {"folder": f"images/{pictures.folder.name}", "hash": key(files)},
        "versions": versions(),
    }  # fmt: skip


def look(
    protocol: Protocol, asked: Sequence[Asked], pictures: Pictures, base: Pictures | None,
    judges: Mapping[str, Judge],
) -> dict[str, list[Any]]:  # fmt: skip
    """What each judge observes of each picture; `BATCH` of them are in memory at a time."""
    found: dict[str, list[Any]] = {name: [] for name in judges}
    pairs = base is not None and any(judge.of_base for judge in judges.values())

    def batch(whose: Pictures, some: Sequence[Asked]) -> list[Tensor]:
        return [read(whose.file(protocol.sampling, a), protocol.saved) for a in some]

    for i in tqdm(range(0, len(asked), BATCH) if judges else (), "judging"):
        some = asked[i : i + BATCH]
        theirs = batch(base, some) if pairs and base is not None else []
        ours = batch(pictures, some)
        for name, judge in judges.items():
            found[name] += judge.look(ours, some, theirs)
    return found


def _write(file: Path, row: dict[str, Any]) -> None:
    """Into the file, in the place of the same model's row of the same label and target."""

    def place(of: Mapping[str, Any]) -> tuple[str, str, str]:
        return key(of["made_of"]), of["label"], json.dumps(of["forget"])

    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    rows = [r for r in before if place(r) != place(row)] + [row]
    with replacing(file) as work:
        work.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def _said(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{row['model']} by {row['label']}:"
    for name, figure in row["figures"].items():
        if "/" not in name:  # one of many alike, which are in the file
            yield f"  {name}: {json.dumps(figure)}"
