"""Many concepts: ten digits, each in one style, forgotten together or one request after the other.

A pair such as "halftone two" becomes the next digit in the same style, in nine wordings, so that
ten pairs are 90 prompts. The digit in other styles shall stay, and so shall the style of other
digits. The number of steps is the same for every number of pairs. One after the other means that
each request starts from the model that the last one made, and remembers prompts that name anything
but its own pair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..baselines import closed_forms
from ..errors import InputError
from ..files import replacing
from ..training.fields import option
from . import rows, runs
from .many_prompts import LISTS, PAIRS, Pair, becomes, remembered, templates, wordings
from .many_results import looks, seen, table
from .options import Seeds
from .runs import Run, Task, task
from .settings import losses
from .text_options import OfWorld, check_methods
from .text_prompts import PromptFiles
from .text_tables import STEPS
from .text_worlds import EDIT_TAKES, MEASURE, UNLEARN, Given, TextSetting

IMAGES_PER_PAIR = 16
IN_TURN = "one after the other"


class Way(NamedTuple):
    """A way to forget all pairs together.

    Attributes:
        times: the number of steps, as a multiple.
        near: remember two prompts of each kept pair, instead of as many sampled from all.
    """

    title: str
    times: int = 1
    near: bool = False


TOGETHER = Way("together")
#: For the largest number of pairs.
VARIANTS = (
    Way("together, three times the steps", times=3),
    Way("together, every kept pair remembered", near=True),
    Way("together, both", times=3, near=True),
)


@dataclass(frozen=True, kw_only=True)
class Many(Seeds, OfWorld):
    """The methods and the numbers of concepts."""

    seeds: list[int] = option([1, 2, 3], help="Seeds of the runs that forget all pairs together.")
    methods: list[str] = option(
        ["ebu_added", "joint", "salun"],
        help=f"Methods to compare. Closed forms, {', '.join(closed_forms)}, have no randomness "
        "and run with the first seed alone.",
    )
    counts: list[int] = option([1, 3, 10], help="Numbers of pairs: the first ones of the list.")
    in_turn: list[str] = option(
        ["ebu_added", "joint"],
        nargs="*",
        help="Methods that also forget one pair after the other, with the first seed.",
    )

    varied: list[str] = option(
        ["ebu_added", "joint"],
        nargs="*",
        help="Methods that also forget the largest number of pairs in three times the steps, with "
        "every kept pair among the prompts to remember, and with both.",
    )

    pairs: Literal["reported", "trial"] = option(
        "reported", help="The pairs of the published table, or ten others for choosing numbers."
    )
    closed_form_options: dict[str, Any] = option(
        {},
        metavar="JSON",
        help="Numbers of closed forms instead of the published ones, for example "
        '\'{"speed": {"ridge": 0.01}}\'.',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods((*self.methods, *self.in_turn), closed_forms)
        check_methods(self.varied)
        if wrong := [n for n in self.counts if not 1 <= n <= len(PAIRS)]:
            raise InputError(f"--counts {wrong[0]}: give numbers from 1 to {len(PAIRS)}")
        if other := [name for name in self.closed_form_options if name not in closed_forms]:
            raise InputError(
                f"--closed_form_options {other[0]}: give objects for {', '.join(closed_forms)}"
            )

    def how(self, way: str, method: str) -> str:
        """The way with the numbers that are not the published ones."""
        given = self.closed_form_options.get(method, {})
        return ", ".join([way, *(f"{name} {value:g}" for name, value in given.items())])


class Requests(PromptFiles):
    """The runs that forget pairs.

    Args:
        setting: the setting of the first pair's digit.
    """

    def __init__(self, args: Many, setting: TextSetting) -> None:
        super().__init__(setting.root / "prompts")
        self.args, self.setting, self.pairs = args, setting, LISTS[args.pairs]
        self.drawing: dict[Any, str] = {}  # what two runs must not make at once -> who makes it

    def together(self, method: str, count: int, seed: int, way: Way = TOGETHER) -> Run:
        made = self._unlearned(method, self.pairs[:count], seed, self.setting.base, way)
        return self._run(f"{way.title}, {count}", method, seed, [made], [made], (way, count))

    def in_turn(self, method: str, seed: int) -> Run:
        """All requests, with a look after each number of `counts`."""
        made: list[Task] = []
        of = self.setting.base
        for pair in self.pairs[: max(self.args.counts)]:
            made.append(self._unlearned(method, [pair], seed, of))
            of = Given(made[-1].folder / "pipeline", made[-1].folder.name, made[-1])
        looked = [made[n - 1] for n in sorted(set(self.args.counts))]
        return self._run(IN_TURN, method, seed, made, looked, (TOGETHER, 1))

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
        first: tuple[Way, int],
    ) -> Run:
        """Args: first: how the first of the models `made` forgets, and how many pairs."""
        name = f"{self.setting.world.name}: {what}, {method}, seed {seed}"
        tasks = [*made, *(t for m in looked for t in self._judged(m))]
        steps = sum(m.options.get("max_train_steps", 0) for m in made)
        # the attack's images, the sets of the first model, and that model itself
        draws = ["target", (first, seed), (first, seed, method)]
        makers = [self.drawing.setdefault(d, name) for d in draws]
        after = [r.name for r in self.setting.trained] + [m for m in makers if m != name]
        seconds = self.setting.world.seconds["unlearn"] * steps + 40.0 * len(looked)
        seconds += EDIT_TAKES * len(made) * (method in closed_forms)
        return Run(name, tuple(tasks), seconds, steps, tuple(after))

    def _unlearned(
        self, method: str, gone: Sequence[Pair], seed: int, of: Given, way: Way = TOGETHER
    ) -> Task:
        setting, w = self.setting, self.setting.world
        first = f"{len(gone)}-{'-'.join(gone[0])}"
        choice = rows.tuned(setting, method)
        prompts = {
            "forget": [self.path(f"forget-{first}", wordings(gone))],
            "surrogate_concept": [self.path(f"instead-{first}", wordings(map(becomes, gone)))],
            "remember_prompts": [self.path(f"remember-{first}", remembered(gone, way.near))],
        }
        training: dict[str, Any] = {}
        if numbers := self.args.closed_form_options.get(method):
            training = {"method_options": numbers}
        elif method not in closed_forms:
            training = {
                **losses(setting.loss, method),
                "max_train_steps": way.times * (self.args.steps or STEPS),
                **w.unlearn,
                "train_modules": setting.trains(method),
                **choice.given,
                "validation_steps": 0,
            }
        options = {
            "method": method,
            "seed": seed,
            **prompts,
            "surrogate_pairing": "each",
            **training,
            "save_as": "pipeline",
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
            {"attacks": ["relearn"], "forget_templates": templates(self.pairs[0])},
        )
        return self._measured(folder, of, label), relearned

    def _measured(self, pipeline: Path, of: str, label: str) -> Task:
        s = self.setting
        options = {**s.world.measure, "images_per_pair": IMAGES_PER_PAIR}
        where = {"pretrained_model_name_or_path": pipeline, "judges": s.judges.folder}
        return task(MEASURE, options, s.root, f"measured/many-{label}", where, [of, s.judges.key])


def many(args: Many, script: str = "many") -> None:
    """Make the missing runs, and write results.json and results.md."""
    setting = args.setting(LISTS[args.pairs][0][0])
    requests = Requests(args, setting)
    found: list[tuple[str, str, int, Run, list[int] | None]] = []
    for seed in args.seeds:  # so that the first seed's results are complete early
        for count in args.counts:
            for method in check_methods(args.methods, closed_forms):
                if method in closed_forms and seed != args.seeds[0]:
                    continue
                run = requests.together(method, count, seed)
                found.append((args.how(TOGETHER.title, method), method, seed, run, None))
        for way in VARIANTS:
            for method in check_methods(args.varied):
                run = requests.together(method, max(args.counts), seed, way)
                found.append((way.title, method, seed, run, None))
        if seed == args.seeds[0]:
            for method in check_methods(args.in_turn, closed_forms):
                how = args.how(IN_TURN, method)
                run = requests.in_turn(method, seed)
                found.append((how, method, seed, run, args.counts))
    base = requests.base()
    todo = [*setting.trained, base, *(run for *_, run, _ in found)]
    if not args.announced(todo):
        return
    setting.write_prompts()
    requests.write_prompts()
    runs.execute(todo, args.processes)
    results = [{"how": "base model", **seen(base.tasks[0], requests.pairs)}]
    for how, method, seed, run, counts in found:
        results += [
            {"how": how, "method": method, "seed": seed, **row}
            for row in looks(run, counts, requests.pairs)
        ]
    folder = setting.root / script
    for name, text in {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.md": table(results),
    }.items():
        with replacing(folder / name) as work:
            work.write_text(text, encoding="utf-8")
    print(table(results))
