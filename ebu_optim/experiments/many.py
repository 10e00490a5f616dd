"""Many concepts: ten digits, each in one style, forgotten together or one request after the other.

A pair such as "halftone two" becomes the next digit in the same style, in nine wordings, so that
ten pairs are 90 prompts. The digit in other styles shall stay, and so shall the style of other
digits. The number of steps is the same for every number of pairs. One after the other means that
each request starts from the model that the last one made, and remembers prompts that name anything
but its own pair.
"""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..baselines import methods as known
from ..errors import InputError
from ..files import replacing
from ..metrics.intervals import t_interval
from ..training.fields import option
from ..worlds.styled_digits.captions import CONTENTS, TRAINED, Caption, captions
from . import rows, runs
from .options import Seeds
from .runs import Run, Task, task
from .text_options import OfWorld, check_methods
from .text_prompts import REMEMBERED, PromptFiles
from .text_tables import STEPS
from .text_worlds import MEASURE, UNLEARN, TextSetting
from .worlds import losses

Pair = tuple[str, str]
#: Every digit once, and every style twice; named before anything was run.
PAIRS: tuple[Pair, ...] = (
    ("zero", "outline"),
    ("one", "negative"),
    ("two", "halftone"),
    ("three", "red"),
    ("four", "blue"),
    ("five", "outline"),
    ("six", "negative"),
    ("seven", "halftone"),
    ("eight", "red"),
    ("nine", "blue"),
)
IMAGES_PER_PAIR = 16
JOINTLY, IN_TURN = "together", "one after the other"


@dataclass(frozen=True, kw_only=True)
class Many(Seeds, OfWorld):
    """The methods and the numbers of concepts."""

    seeds: list[int] = option([1, 2, 3], help="Seeds of the runs that forget all pairs together.")
    methods: list[str] = option(["ebu_added", "joint", "salun"], help="Methods to compare.")
    counts: list[int] = option([1, 3, 10], help="Numbers of pairs: the first ones of the list.")
    in_turn: list[str] = option(
        ["ebu_added", "joint"],
        help="Methods that also forget one pair after the other, with the first seed.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods((*self.methods, *self.in_turn))
        if wrong := [n for n in self.counts if not 1 <= n <= len(PAIRS)]:
            raise InputError(f"--counts {wrong[0]}: give numbers from 1 to {len(PAIRS)}")


class Requests(PromptFiles):
    """The runs that forget pairs.

    Args:
        setting: the setting of the first pair's digit.
    """

    def __init__(self, args: Many, setting: TextSetting) -> None:
        super().__init__(setting.root / "prompts")
        self.args, self.setting = args, setting
        self.drawing: dict[Any, str] = {}  # what two runs must not draw at once -> who draws it

    def together(self, method: str, count: int, seed: int) -> Run:
        made = self._unlearned(method, PAIRS[:count], seed, self.setting.base)
        return self._run(f"together-{count}", method, seed, [made], [made], count)

    def in_turn(self, method: str, seed: int) -> Run:
        """All requests, with a look after each number of `counts`."""
        made: list[Task] = []
        for pair in PAIRS[: max(self.args.counts)]:
            of = _Made(made[-1]) if made else self.setting.base
            made.append(self._unlearned(method, [pair], seed, of))
        looked = [made[n - 1] for n in sorted(set(self.args.counts))]
        return self._run("in-turn", method, seed, made, looked, 1)

    def base(self) -> Run:
        of = self.setting.base
        measured = self._measured(of.folder, of.key, "base-pairs")
        return Run("base, pairs", (measured,), 30.0, 0, tuple(r.name for r in self.setting.trained))

    def _run(
        self,
        what: str,
        method: str,
        seed: int,
        made: Sequence[Task],
        looked: Sequence[Task],
        first: int,
    ) -> Run:
        """Args: first: the number of pairs that the first of the models `made` forgets."""
        name = f"{self.setting.world.name}: {what}, {method}, seed {seed}"
        tasks = [*made, *(t for m in looked for t in self._judged(m))]
        steps = len(made) * (self.args.steps or STEPS)
        # the attack's pictures, the sets of the first model, and that model itself
        draws = ["target", (first, seed), (first, seed, method)]
        makers = [self.drawing.setdefault(d, name) for d in draws]
        after = [r.name for r in self.setting.trained] + [m for m in makers if m != name]
        seconds = self.setting.world.seconds["unlearn"] * steps + 40.0 * len(looked)
        return Run(name, tuple(tasks), seconds, steps, tuple(after))

    def _unlearned(self, method: str, gone: Sequence[Pair], seed: int, of: Any) -> Task:
        setting, w = self.setting, self.setting.world
        first = f"{len(gone)}-{'-'.join(gone[0])}"
        choice = rows.tuned(setting, method)
        prompts = {
            "forget": [self.path(f"forget-{first}", wordings(gone))],
            "surrogate_concept": [self.path(f"instead-{first}", wordings(map(becomes, gone)))],
            "remember_prompts": [self.path(f"remember-{first}", remembered(gone))],
        }
        options = {
            "method": method,
            **losses(setting.loss, method),
            "seed": seed,
            **prompts,
            "surrogate_pairing": "each",
            "max_train_steps": self.args.steps or STEPS,
            **w.unlearn,
            "train_modules": setting.trains(method),
            **choice.given,
            "save_as": "pipeline",
            "validation_steps": 0,
        }
        where = {"pretrained_model_name_or_path": of.folder, "sets_dir": setting.root / "sets"}
        label = f"many/{first}-{method}-s{seed}"
        return task(UNLEARN, options, setting.root, label, where, [of.key])

    def _judged(self, made: Task) -> tuple[Task, Task]:
        label = made.folder.name.rpartition("-")[0]
        folder, of = made.folder / "pipeline", made.folder.name
        relearned = self.setting.attacked(
            folder,
            [of],
            f"many-{label}",
            {"attacks": ["relearn"], "forget_templates": templates(PAIRS[0])},
        )
        return self._measured(folder, of, label), relearned

    def _measured(self, pipeline: Path, of: str, label: str) -> Task:
        s = self.setting
        options = {**s.world.measure, "images_per_pair": IMAGES_PER_PAIR}
        where = {"pretrained_model_name_or_path": pipeline, "judges": s.judges.folder}
        return task(MEASURE, options, s.root, f"measured/many-{label}", where, [of, s.judges.key])


class _Made:
    """A model that a task made, in place of the base."""

    def __init__(self, made: Task) -> None:
        self.folder, self.key = made.folder / "pipeline", made.folder.name


def named(pair: Pair) -> list[Caption]:
    """The trained prompts that name the pair by its first words."""
    return [c for c in captions(TRAINED) if (c.content_word, c.style_word) == pair]


def wordings(pairs: Iterable[Pair]) -> list[str]:
    return [c.text for pair in pairs for c in named(pair)]


def becomes(pair: Pair) -> Pair:
    """The next digit in the same style. It is no pair of the list."""
    names = list(CONTENTS)
    return names[(names.index(pair[0]) + 1) % len(names)], pair[1]


def templates(pair: Pair) -> list[str]:
    """The pair's prompts with a place for the digit, for relearning."""
    return [re.sub(rf"\b{pair[0]}\b", "{}", text) for text in wordings([pair])]


def remembered(gone: Sequence[Pair]) -> list[str]:
    texts = [c.text for c in captions(TRAINED) if (c.content, c.style) not in gone]
    return random.Random(0).sample(texts, REMEMBERED)  # noqa: S311


def many(args: Many, script: str = "many") -> None:
    """Make the missing runs, and write many.json and many.md."""
    setting = args.setting(PAIRS[0][0])
    requests = Requests(args, setting)
    found: list[tuple[str, str, int, Run]] = [
        (JOINTLY, method, seed, requests.together(method, count, seed))
        for seed in args.seeds
        for count in args.counts
        for method in check_methods(args.methods)
    ]
    found += [
        (IN_TURN, method, args.seeds[0], requests.in_turn(method, args.seeds[0]))
        for method in check_methods(args.in_turn)
    ]
    base = requests.base()
    todo = [*setting.trained, base, *(run for *_, run in found)]
    if not args.announced(todo):
        return
    setting.write_prompts()
    requests.write_prompts()
    runs.execute(todo, args.processes)
    results = [{"how": "base model", **seen(base.tasks[0], len(PAIRS))}]
    for how, method, seed, run in found:
        results += [
            {"how": how, "method": method, "seed": seed, **row}
            for row in looks(run, args.counts if how == IN_TURN else None)
        ]
    folder = setting.root / script
    for name, text in {
        "many.json": json.dumps(results, indent=1) + "\n",
        "many.md": table(results),
    }.items():
        with replacing(folder / name) as work:
            work.write_text(text, encoding="utf-8")
    print(table(results))


def looks(run: Run, counts: Sequence[int] | None) -> list[dict[str, Any]]:
    """A row for each look at the models of a run."""
    made = [t for t in run.tasks if t.maker is UNLEARN]
    judged = [t for t in run.tasks if t.maker is not UNLEARN]
    asked = len(wordings(PAIRS[:1]))
    said = [json.loads((t.folder / UNLEARN.last).read_text(encoding="utf-8")) for t in made]
    numbers = sorted(set(counts)) if counts else [len(said[0]["forget"]) // asked]
    rows = []
    for n, measured, relearned in zip(numbers, judged[::2], judged[1::2]):
        took = sum(r["seconds"] for r in (said[:n] if counts else said))
        rows.append({**seen(measured, n), "seconds": took, "relearn_steps": relearn(relearned)})
    return rows


def relearn(attacked: Task) -> float:
    """Steps until the first pair is back; the maximum if it is not."""
    values = json.loads((attacked.folder / "attacks.json").read_text(encoding="utf-8"))["values"]
    found = values["relearn_steps"]
    return float(found["steps"] if found["reached"] else found["within"])


def seen(measured: Task, count: int) -> dict[str, Any]:
    """What is left of the first `count` pairs, and of all others."""
    file = measured.folder / MEASURE.last
    pairs = json.loads(file.read_text(encoding="utf-8"))["measured"]["pair"]
    gone = [" ".join(pair) for pair in PAIRS[:count]]
    kept = [name for name in pairs if name not in gone]
    worst = min(kept, key=lambda name: min(pairs[name]["content"], pairs[name]["style"]))
    return {
        "pairs": count,
        "forgotten": statistics.fmean(pairs[name]["content"] for name in gone),
        "first": pairs[gone[0]]["content"],
        "content": statistics.fmean(pairs[name]["content"] for name in kept),
        "style": statistics.fmean(pairs[name]["style"] for name in kept),
        "worst": min(pairs[worst]["content"], pairs[worst]["style"]),
        "worst_pair": worst,
    }


#: Title of a column -> its value in a row, and the digits that are shown.
COLUMNS: Mapping[str, tuple[str, int]] = {
    "forgotten ↓": ("forgotten", 3),
    "the first ↓": ("first", 3),
    "kept, digit ↑": ("content", 3),
    "kept, style ↑": ("style", 3),
    "worst pair ↑": ("worst", 3),
    "relearn_steps ↑": ("relearn_steps", 1),
    "seconds": ("seconds", 0),
}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method, way and number of pairs: the mean over seeds ± half its 95 %
    interval."""
    lines = [f"| | pairs | seeds | {' | '.join(COLUMNS)} |", f"|{'---|' * (3 + len(COLUMNS))}"]
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["how"], row.get("method"), row["pairs"]), []).append(row)
    for (how, method, count), members in groups.items():
        title = f"{known[method].title}, {how}" if method else how
        cells = [_cell(members, *column) for column in COLUMNS.values()]
        lines.append(f"| {title} | {count} | {len(members)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(members: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    values = [row[name] for row in members if name in row]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    low, high = t_interval(values)
    return f"{mean} ± {(high - low) / 2:.{digits}f}"
