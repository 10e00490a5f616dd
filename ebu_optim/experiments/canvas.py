"""UnlearnCanvas in small: each style and each digit of the world of digits in styles is unlearned
by itself, by each method, and every model is evaluated by the protocol ``unlearncanvas-digits``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..baselines import methods as known
from ..protocols import Evaluate, evaluate
from ..protocols.compare import Compare, compare
from ..training.fields import option
from ..worlds.styled_digits.captions import CONTENTS, STYLES, UNNAMED
from . import rows, runs
from .options import Seeds
from .runs import Maker, Run, task
from .text_options import OfWorld, check_methods
from .text_tables import STEPS, tag
from .text_worlds import TextSetting

PROTOCOL = "unlearncanvas-digits"
#: Several seeds, and one.
COMPARED = ("ebu_added", "joint", "salun")
ONCE = ("selective_amnesia", "esd", "spm")
TARGETS = (*(s for s in STYLES if s != UNNAMED), *CONTENTS)
EVALUATE = Maker(evaluate, Evaluate, "protocols.json")
#: Seconds of one core of a busy x86-64 CPU: unlearning with its sets, and evaluating a model.
TAKES = {"salun": 50.0, "esd": 104.0, "spm": 159.0}
OTHERS, JUDGED = 81.0, {"spm": 68.0}  # EBU's; SPM draws five pictures at a time
EVALUATED = 29.0


@dataclass(frozen=True, kw_only=True)
class Canvas(Seeds, OfWorld):
    """Which targets, by which methods."""

    seeds: list[int] = option(
        [1, 2, 3], help=f"Seeds of {', '.join(COMPARED)}. The other methods have the first of them."
    )
    methods: list[str] = option([*COMPARED, *ONCE], help="Methods to compare.")
    targets: list[str] = option(list(TARGETS), help="Styles and digits, each forgotten by itself.")
    protocol: Literal["unlearncanvas-digits", "unlearncanvas-digits-seed188"] = option(
        PROTOCOL, help="The protocol that evaluates every model."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods(self.methods)


def canvas(args: Canvas, script: str = "unlearncanvas") -> None:
    """Unlearn and evaluate what is missing, then compare."""
    settings = {name: args.setting(name) for name in args.targets}
    todo = [*next(iter(settings.values())).trained]
    for method in check_methods(args.methods):
        choice = chosen(args, method)
        seeds = args.seeds if method in COMPARED else args.seeds[:1]
        for setting in settings.values():
            todo += [evaluated(args, setting, method, choice, seed) for seed in seeds]
    if not args.announced(todo):
        return
    for setting in settings.values():
        setting.write_prompts()
    runs.execute(todo, args.processes)
    first = next(iter(settings.values()))
    root = first.root / script
    base = [_base(args, setting, root / "base") for setting in settings.values()][-1]
    folders = [r.folder for r in todo if r.tasks[-1].maker is EVALUATE]
    compare(
        Compare(
            runs=[str(folder) for folder in (base, *folders)],
            output_dir=root,
            names=[f"{first.base.folder}=base model"],
        )
    )


def chosen(args: OfWorld, method: str) -> rows.Choice:
    """One set of numbers for all targets: what sd_tune.py chose for digits, by trials on one of
    them and a seed that is not reported."""
    return rows.tuned(args.setting(next(iter(CONTENTS))), method)


def evaluated(
    args: Canvas, setting: TextSetting, method: str, choice: rows.Choice, seed: int
) -> Run:
    """Unlearned, and evaluated; SPM by its adapter, which the protocol scales for each prompt."""
    steps, name = args.steps or STEPS, tag(setting, choice, setting.trains(method))
    kept = "lora" if known[method].forgets == "adapter" else "pipeline"
    alone = setting.unlearned(
        f"{method}-{name}", method, seed=seed, steps=steps, options=choice.given, save_as=kept
    )
    (made,) = alone.tasks
    where = {"pretrained_model_name_or_path": [made.folder / kept], **_beside(setting)}
    judged = task(
        EVALUATE,
        {
            "protocol": [args.protocol],
            "forget": [setting.target],
            "sample_batch_size": 60,
            "only": True,
        },
        setting.root,
        f"canvas/{made.folder.name.rpartition('-')[0]}",
        where,
        [made.folder.name, setting.base.key, setting.judges.key],
    )
    full = f"{setting.world.name}: {judged.folder.name.rpartition('-')[0]}, {PROTOCOL}"
    makers = setting.makers(full, method, seed)
    ground = tuple(r.name for r in setting.trained)
    seconds = TAKES.get(method, OTHERS) + JUDGED.get(method, EVALUATED)
    return Run(full, (made, judged), seconds, steps, (*ground, *makers))


def _beside(setting: TextSetting) -> dict[str, Any]:
    return {"base": str(setting.base.folder), "files": [f"digits-judges={setting.judges.folder}"]}


def _base(args: Canvas, setting: TextSetting, folder: Path) -> Path:
    """What the base itself scores: drawn once, counted for each target."""
    evaluate(
        Evaluate(
            pretrained_model_name_or_path=[],
            protocol=[args.protocol],
            forget=[setting.target],
            sample_batch_size=60,
            output_dir=folder,
            **_beside(setting),
        )
    )
    return folder
