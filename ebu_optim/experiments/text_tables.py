"""The text-to-image experiments: their options, and a table at small and at the paper's scale."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..baselines import methods
from ..errors import InputError
from ..metrics.protocol import TEXT_TO_IMAGE
from ..text_to_image.modules import Modules
from ..training.fields import at_least, option
from . import pages, rows, runs, tables, text_pages, text_results, worlds
from .options import Experiment, Seeds
from .runs import Run
from .tables import Row
from .text_paper import SD14, WEIGHTS, PaperSetting, PaperWorld, choice
from .text_scales import FLOW_DIGITS, STYLED_DIGITS
from .text_tasks import Target
from .text_worlds import TextSetting

ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = ("ebu_added", "ebu_replaced", "joint", "selective_amnesia", "salun", "esd", "spm")
STEPS = 100  # of unlearning, at small scale
AXES = ("p_f", "ra", "ra_never_replayed", "worst_drop", "inversion_100")
TUNING = (
    "each row's; trials are sd_tune.py's, as many as the row says, in the setting it names: the "
    "same steps for each method, another target, seed 0, which is not reported, score (1 - P_f) + "
    "RA (never replayed, where that is told) - worst drop + (1 - P_f after 100 steps of inversion)"
)
PAPER_AXES = ("ce_f", "ra", "nudity_score", "clip_score", "lpips_f", "inversion_200")
#: The paper's rows by our methods.
PAPER = {**rows.PAPER, "esd": "ESD", "spm": "SPM"}
UNATTACKED = (
    "Not attacked: there is no judge that tells the target in a picture. LPIPS says how far the "
    "pictures moved, not whether the target is gone or its words alone."
)
SMALL = "at --scale small"
PAPER_SCALE = "at --scale paper"


@dataclass(frozen=True, kw_only=True)
class OfWorld(Experiment):
    """In the world of digits in styles.

    Raises:
        InputError: numbers that cannot be.
    """

    group: ClassVar[str] = SMALL
    scales: ClassVar[Mapping[str, Any]] = {"small": STYLED_DIGITS, "flow": FLOW_DIGITS}

    base: Path | None = option(None, help="a pipeline of world/train.py, in place of training one")
    judges: Path | None = option(None, help="folder of world/judges.py, in place of training them")
    regime: Literal["list", "few"] = option(
        "list", help="prompts that are remembered: 100 without the target, or those of few other "
        "concepts, so that what was never replayed can be told",
    )  # fmt: skip
    loss: worlds.Loss = option("relabel", help="to remember by; relabel: to forget by too")
    surrogate: Literal["other", "empty", "gaussian"] = option(
        "other", help="drawn in place of the target: another concept, what the empty prompt draws "
        "(of a content, every tenth picture is the target itself), Gaussian latents",
    )  # fmt: skip
    train_modules: Modules = option("full", help="as of unlearn.py; SPM has adapters of its own")
    images_per_pair: int | None = option(
        None, help="as of world/measure.py; default: 8, so that a content is judged on 40 or 48 "
        "pictures and a style on 72 or 80",
    )  # fmt: skip
    steps: int | None = option(
        None, help="of unlearning; default: 100, at --scale paper the paper's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "images_per_pair")

    def setting(self, target: str, beside: Sequence[str] = ()) -> TextSetting:
        world = self.world
        if self.images_per_pair is not None:
            measure = {**world.measure, "images_per_pair": self.images_per_pair}
            world = world._replace(measure=measure)
        return TextSetting(
            world, self.output_dir, target=target, beside=beside, regime=self.regime,
            loss=self.loss, surrogate=self.surrogate, modules=self.train_modules, base=self.base,
            judges=self.judges,
        )  # fmt: skip

    def run(self, setting: TextSetting | PaperSetting, todo: Sequence[Run]) -> bool:
        """Say what it costs, then run what is missing; False after a --dry_run."""
        if not self.announced(todo, setting.world):
            return False
        setting.write_prompts()
        runs.execute(todo, self.processes)
        judged = [r for r in todo if len(r.tasks) > 1 and r not in setting.ground]
        if isinstance(setting, PaperSetting):
            setting.write_results(judged)
        else:
            text_results.write(setting, judged)
        return True


@dataclass(frozen=True, kw_only=True)
class TextExperiment(OfWorld):
    """In that world, or on Stable Diffusion 1.4.

    Raises:
        InputError: options of the other scale.
    """

    group: ClassVar[str] = PAPER_SCALE
    scales: ClassVar[Mapping[str, Any]] = {**OfWorld.scales, "paper": SD14}

    real_images: Path | None = option(None, help="real images of the kept classes, for FID")
    pretrained_model_name_or_path: str | None = option(
        None, help=f"folder or hub id of Stable Diffusion 1.4; default: {SD14.pipeline}"
    )
    resnet_weights: Path | None = option(None, help="file; default: a download. A metric that had "
                                         "none is measured anew with it")  # fmt: skip
    clip_weights: Path | None = option(None, help="the same")
    alexnet_weights: Path | None = option(None, help="the same")
    inception_weights: Path | None = option(None, help="the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        others: tuple[str, ...] = ("base", "judges")
        if self.scale != "paper":
            others = ("pretrained_model_name_or_path", "real_images", *WEIGHTS.values())
        for name in others:
            if getattr(self, name) is not None:
                of = "small" if self.scale == "paper" else "paper"
                raise InputError(f"--{name} is of --scale {of}; leave it out")

    def paper_setting(self, target: Target) -> PaperSetting:
        world: PaperWorld = self.world
        if given := self.pretrained_model_name_or_path:
            folder = Path(given)
            world = world._replace(pipeline=folder.resolve() if folder.is_dir() else given)
        weights = {name: getattr(self, name) for name in WEIGHTS.values()}
        return PaperSetting(world, self.output_dir, target, self.real_images, weights)


@dataclass(frozen=True, kw_only=True)
class Chosen(TextExperiment):
    """With a choice of methods, which a subclass gives `seeds`.

    Raises:
        InputError: a method that there is not.
    """

    methods: list[str] | None = option(
        None, help=f"default: {', '.join(METHODS)}; at paper scale the paper's; retrain is a base "
        "of its own that never saw the target, at small scale",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods(self.methods or ())

    def seeds_of(self, method: str) -> Sequence[int]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Methods(Seeds, Chosen):
    """With seeds, more of them for the rows that are compared.

    Raises:
        InputError: a method that there is not; a seed twice.
    """

    seeds: list[int] = option([1], help="of EBU, the plain sum and --best")
    seeds_rest: list[int] | None = option(None, help="of the others; default: --seeds")
    best: list[str] = option(["salun"], help="the best baselines")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows.check_seeds(self.seeds_rest or self.seeds, "--seeds_rest")
        check_methods(self.best)

    def seeds_of(self, method: str) -> Sequence[int]:
        full = ("ebu_added", "joint", *check_methods(self.best))
        return self.seeds if method in full else self.seeds_rest or self.seeds


def check_methods(given: Sequence[str]) -> list[str]:
    """By their names in the package, each once."""
    known = [m for m in methods if m != "embedding_only"]
    names = [ALIASES.get(m, m) for m in given]
    for m in names:
        if m not in known:
            raise InputError(f"--methods {m}: there is {', '.join(known)}")
    return list(dict.fromkeys(names))


def table(args: Chosen, setting: TextSetting) -> list[Row]:
    """The chosen methods."""
    return [
        row(setting, m, args.seeds_of(m), args.steps or STEPS)
        for m in check_methods(args.methods or METHODS)
    ]


def row(setting: TextSetting, method: str, seeds: Sequence[int], steps: int) -> Row:
    if method == "retrain":  # one, of the base's seed
        base = rows.Choice(2e-3, {})
        run = setting.run("retrain", "retrain", seed=0)
        return Row(rows.title(method), (run,), setting.world.base["max_train_steps"], base, "none")
    chosen = tag(setting, rows.tuned(setting, method), setting.trains(method))
    return tables.row(setting, method, seeds, steps=steps, tag=chosen)


def tag(
    setting: TextSetting | PaperSetting, choice: rows.Choice, modules: str | None = None
) -> str:
    return f"{setting.surrogate}-{modules or setting.modules}-{choice.name}"


def pictures(setting: TextSetting, found: Sequence[Row]) -> list[Run]:
    """Pictures of the base's and of every row's first seed."""
    drawn = [setting.pictures(r.runs[0].tasks[0].folder.name, r.runs[0]) for r in found]
    return [setting.base_pictures(), *drawn]


def either(
    args: Chosen, target: str, task: Target, *, script: str, title: str,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """A table of a target at small scale, or of a task at the paper's."""
    if args.scale == "paper":
        large(args, task, script=script, title=title)
    else:
        small(
            args, target, script=script, title=f"{title} on {args.world.title}", paper=task.paper,
            notes=notes,
        )  # fmt: skip


def small(
    args: Chosen, target: str, *, script: str, title: str, paper: str | None = None,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """A table of the world of digits in styles."""
    s = args.setting(target)
    found = table(args, s)
    drawn = pictures(s, found)
    if not args.run(s, [*s.ground, *(run for r in found for run in r.runs), *drawn]):
        return
    first = found[0].runs[0]
    said = text_results.training(s, text_pages.typical(found), TUNING)
    said["unlearning"]["settings"] = pages.settings(found)
    said["unlearning"]["forget_loss"] += ": ESD and SPM forget the bare word"
    said["unlearning"]["trained"] += ", of ESD cross attention"
    name = "-".join([script, s.target, s.regime, s.loss, s.surrogate, s.modules])
    pages.report(
        s.root / name, s, found, said=said | text_results.judging(s, first),
        limits=rows.results(first.folder)[:1], paper=paper,
        title=f"{title}: {s.target!r} forgotten, prompts remembered: {s.regime}, by {s.loss}; "
        f"instead: {s.surrogate}",
        command=args.command(script), parts=TEXT_TO_IMAGE,
        notes=[*notes, *text_pages.marks(found), *text_pages.apart(s, found)],
        plots=text_pages.plots(found), grids=[text_pages.grid(found, drawn, [s.target])],
        axes=AXES, one="one base model, and sets of their own", shown="Curves and pictures",
    )  # fmt: skip


def large(args: Chosen, task: Target, *, script: str, title: str) -> None:
    """A table at the paper's scale."""
    s, steps = args.paper_setting(task), paper_steps(task)
    found = [
        tables.row(s, m, args.seeds_of(m), choice=choice(m), steps=args.steps or steps.get(m, 1000))
        for m in check_methods(args.methods or task.methods)
    ]
    if not args.run(s, [*s.ground, *(run for r in found for run in r.runs)]):
        return
    first = found[0].runs[0]
    said = text_results.training(s, text_pages.typical(found), "none: published settings")
    said["unlearning"]["settings"] = pages.settings(found)
    drawn = [s.ground[0], *(r.runs[0] for r in found)]
    left_out = ("classifier",) if task.judge else ("classifier", "attacks")
    pages.report(
        s.root / f"{script}-{task.name}", s, found, said=said | s.protocol(first),
        limits=rows.results(first.folder)[:1], paper=task.paper,
        title=f"{title}: {task.title} forgotten", notes=() if task.judge else (UNATTACKED,),
        command=args.command(script),
        parts=[part for part in TEXT_TO_IMAGE if part not in left_out],
        plots=text_pages.plots(found) if task.judge else (),
        grids=[text_pages.grid(found, drawn, [task.title], 4)], axes=PAPER_AXES,
        one="one base model, and sets of their own",
        shown="Curves and pictures" if task.judge else "Pictures",
    )  # fmt: skip


def paper_steps(task: Target) -> dict[str, int]:
    """As the paper's column RT has them; where there is none, 1000 for all."""
    lines = json.loads(tables.PAPER.read_text())[task.paper] if task.paper else {}
    return {m: lines[name]["RT"][0] for m, name in PAPER.items() if "RT" in lines.get(name, {})}
