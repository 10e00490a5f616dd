"""Published evaluations of text-to-image models, by name.

    ebu evaluate without/pipeline --base runwayml/stable-diffusion-v1-5 \\
        --protocol imagenette imagenette-esd --forget "cassette player" -o evaluated

Images are kept under a key of everything that they depend on, so that none is generated twice: not
for a second protocol, not for another judge, and not after an interruption. The figures are in
protocols.json, each with the label of its protocol, which names all changes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import replacing
from ..manifest import key
from ..metrics import versions
from ..text_to_image import pipelines, results
from ..text_to_image.pipelines import Model
from .attacking import attacked
from .judges import Judge, open_judge
from .named import label
from .options import Evaluate
from .pictures import Pictures, ahead, read
from .processes import joined
from .protocol import Asked, Protocol, Seen, not_computed
from .samplers import check
from .sets import SetJudge

RESULT = "protocols.json"
#: Images that are in memory at a time, in addition to the judge's own tensors.
BATCH = 16


def evaluate(args: Evaluate) -> list[dict[str, Any]]:
    """Generate, judge and count images, and write the rows to ``protocols.json``.

    Returns:
        The rows of this call: model, label, figures and everything that they depend on.

    Raises:
        InputError: models, lists, files or judges do not fit the protocols.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    listed = {p.name: p.asked(args.given) for p in args.protocols}
    if nothing := [name for name, of in listed.items() if not of]:
        raise InputError(
            f"--protocol {nothing[0]}: its list has no prompt for which an image may be "
            "generated; check the file"
        )
    kept = {name: _pictures(args, name, model) for name, model in args.models().items()}
    if int(os.environ.get("RANK", "0")) == 0:
        for line in plan(args, listed, kept):
            print(line)
    if args.plan:
        return []
    ours, rows = joined(), []
    names = dict.fromkeys(judge for p in args.protocols for judge in p.judges)
    first = ours.rank == 0
    keep = args.output_dir / "statistics"
    judges = {name: open_judge(name, args.given, device, keep) for name in names if first}
    with results.held(args.output_dir) if first else nullcontext():
        for name, pictures in kept.items():
            loaded = _Loaded(partial(_load, args.models()[name], args.base, pictures))
            for protocol in args.protocols:
                of = listed[protocol.name]
                pipe = partial(loaded.pipeline, protocol.sampling.dtype)
                some = of[: args.first]
                pictures.draw(protocol.sampling, some, pipe, args.sample_batch_size, ours)
                if not first:
                    continue
                float32 = partial(loaded.pipeline, "float32")
                looked = pipelines.look(results.whole(args.models()[name], args.base))
                base = kept.get(args.base or "")
                of_base = float32 if base in (None, pictures) else partial(_base, args)
                merged = partial(results.load, args.models()[name], args.base)
                opened = float32, of_base, looked, merged if pictures.adapter else float32
                rows.append(_row(args, protocol, of, pictures, base, judges, opened))
                _write(args.output_dir / RESULT, rows[-1])
                for line in _said(rows[-1]):
                    print(line)
    if first:
        print(f"saved {args.output_dir / RESULT}")
    return rows


class _Loaded:
    """A model's pipeline, opened once, when it is needed.

    It is opened again after its weights were cast to float16, as they are not exact any more."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._pipeline = load, None

    def pipeline(self, dtype: str) -> Any:
        found = self._load() if self._pipeline is None else self._pipeline
        self._pipeline = found if dtype == "float32" else None
        return found


def _pictures(args: Evaluate, name: str, model: Model) -> Pictures:
    looked = pipelines.look(results.whole(model, args.base))
    for protocol in args.protocols:
        check(looked.family, protocol, name)
    adapter = Path(name) if results.erases_by_prompt(Path(name)) else None
    return Pictures(args.output_dir / "images", results.made_of(model, args.base), name, adapter)


def _load(model: Model, base: str | None, pictures: Pictures) -> Any:
    """The model's pipeline; for an SPM adapter that of its base."""
    return results.load(results.whole(model, base) if pictures.adapter else model, base)


def _base(args: Evaluate) -> Any:
    return results.load(args.models()[str(args.base)], args.base)


def plan(
    args: Evaluate, listed: Mapping[str, Sequence[Asked]], kept: Mapping[str, Pictures]
) -> Iterator[str]:
    """Lines that say what the run will generate and what it costs."""
    total = 0
    for name, pictures in kept.items():
        for p in args.protocols:
            of = listed[p.name][: args.first]
            missing = len(pictures.missing(p.sampling, of))
            passes = missing * p.sampling.steps * 2
            total += passes
            targets = p.targets_of(args.forget)
            called = label(p, len(of), targets=targets, listed=listed[p.name])
            yield (
                f"{name}: {called}: {missing:,} of {len(of):,} images to generate, {passes:,} "
                "passes through the denoiser"
            )
            if p.attack is not None:
                each = p.attack.cost(p.sampling.steps)
                yield f"{name}: its attack: up to {each * len(of):,} more, {each:,} a prompt"
    yield f"in all {total:,} passes through the denoiser"
    for p in args.protocols:
        yield from (f"{p.name}: {note}" for note in p.notes)


def _row(
    args: Evaluate,
    protocol: Protocol,
    listed: Sequence[Asked],
    pictures: Pictures,
    base: Pictures | None,
    judges: Mapping[str, Judge | SetJudge | str],
    opened: tuple[Callable[[], Any], Callable[[], Any], Any, Callable[[], Any]],
) -> dict[str, Any]:
    """The row of a model and a protocol.

    Args:
        listed: the whole prompt list, of which the images of the first `args.first` rows are here.
        opened: the further arguments of `attacked`.
    """
    asked = listed[: args.first]
    ours = {name: judges[name] for name in protocol.judges}
    why = {name: judge for name, judge in ours.items() if isinstance(judge, str)}
    there = {name: judge for name, judge in ours.items() if isinstance(judge, Judge)}
    for name, judge in list(there.items()):
        if judge.of_base and base is None:
            why[name] = "not computed: it compares with the base's images: give --base"
            del there[name]
    sets = {name: judge for name, judge in ours.items() if isinstance(judge, SetJudge)}
    files = [pictures.file(protocol.sampling, a) for a in asked]
    content = key([f.name for f in files])
    found: dict[str, Any] = look(protocol, asked, pictures, base, there)
    targets = protocol.targets(args.forget)
    for name, of_set in sets.items():
        some = [f for f, a in zip(files, asked, strict=True) if of_set.counts(a, targets)]
        if len(some) < 2:
            why[name] = not_computed("it needs at least two images")["not_computed"]
        else:
            content_of = key(pictures.model, key([f.name for f in some]))
            found[name] = [of_set.look(some, content_of, targets)]
    if protocol.attack is not None:
        by = protocol.attack.judge
        if by in why or base is None:
            why["attack"] = why.get(by) or (
                "not computed: the attack learns from the base's images: give --base"
            )
        else:
            found["attack"] = attacked(
                protocol,
                asked,
                found[by],
                there[by],
                pictures,
                base,
                *opened,
                args.output_dir / "attacks",
            )
    figures = protocol.count(Seen(asked, targets, found, why))
    identities = {n: j.identity for n, j in ours.items() if n in found and not isinstance(j, str)}
    together = protocol.targets_of(args.forget)
    return {
        "model": pictures.whose,
        "made_of": pictures.model,
        "run": results.run_of(pictures.whose),
        "label": label(protocol, len(asked), identities, together, listed),
        "protocol": {
            "name": protocol.name,
            "title": protocol.title,
            "source": protocol.source,
            "sampling": vars(protocol.sampling),
            "images": len(asked),
            "judges": identities,
            "published_judges": dict(protocol.judges),
            "notes": list(protocol.notes),
        },
        "forget": targets,
        "kind": protocol.kind(targets),
        "figures": figures,
        "pictures": {"folder": f"images/{pictures.folder.name}", "hash": content},
        "versions": versions(),
    }


def look(
    protocol: Protocol,
    asked: Sequence[Asked],
    pictures: Pictures,
    base: Pictures | None,
    judges: Mapping[str, Judge],
) -> dict[str, list[Any]]:
    """Each judge's observations of all images; `BATCH` images are in memory at a time."""
    found: dict[str, list[Any]] = {name: [] for name in judges}
    seeing = [judge for judge in judges.values() if not judge.of_files]
    pairs = base is not None and any(judge.of_base for judge in judges.values())

    def batch(whose: Pictures, some: Sequence[Asked]) -> list[Tensor]:
        return [read(whose.file(protocol.sampling, a), protocol.saved) for a in some]

    def of_both(i: int) -> tuple[list[Tensor], list[Tensor]]:
        some = asked[i : i + BATCH] if seeing else []
        return batch(pictures, some), batch(base, some) if pairs and base is not None else []

    starts = range(0, len(asked), BATCH) if judges else range(0)
    for i, (ours, theirs) in zip(tqdm(starts, "judging"), ahead(of_both, starts), strict=True):
        some = asked[i : i + BATCH]
        files = [pictures.file(protocol.sampling, a) for a in some]
        for name, judge in judges.items():
            found[name] += judge.look(files if judge.of_files else ours, some, theirs)
    return found


def _write(file: Path, row: dict[str, Any]) -> None:
    """Write a row into the file; it replaces the row with the same model, label and target."""

    def place(of: Mapping[str, Any]) -> tuple[str, str, str]:
        return key(of["made_of"]), of["label"], json.dumps(of["forget"])

    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    rows = [r for r in before if place(r) != place(row)] + [row]
    with replacing(file) as work:
        work.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


def _said(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{row['model']} by {row['label']}:"
    for name, figure in row["figures"].items():
        if "/" not in name:  # the many figures with "/" are only in the file
            yield f"  {name}: {json.dumps(figure)}"
