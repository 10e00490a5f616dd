"""UnlearnCanvas in small: each style and each digit of the world of digits in styles is unlearned
by itself, by each method, and every model is evaluated by the protocol ``unlearncanvas-digits``.
Of some targets, which are named before anything is run, each method's model of the first seed is
attacked by every attack."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..attacks.attacks import ATTACKS
from ..baselines import closed_forms
from ..baselines import recipes as known
from ..errors import InputError
from ..files import replacing
from ..protocols import Evaluate, evaluate
from ..protocols.compare import Compare, compare
from ..training.fields import option
from ..worlds.styled_digits.captions import CONTENTS, STYLES, UNNAMED
from . import canvas_results, rows, runs
from .options import OUTPUT, Seeds
from .runs import Maker, Run, task
from .text_options import OfWorld, check_methods
from .text_tables import STEPS, tag
from .text_worlds import ATTACK, EDIT_TAKES, TRAIN, TextSetting

PROTOCOL, BASE = "unlearncanvas-digits", "base model"
#: Methods with several seeds, and methods with one.
COMPARED = ("ebu_added", "joint", "salun")
ONCE = ("selective_amnesia", "esd", "spm", *closed_forms)
#: Without the closed forms, so that the table stays the one that was published.
USUAL = tuple(m for m in (*COMPARED, *ONCE) if m not in closed_forms)
TARGETS = (*(s for s in STYLES if s != UNNAMED), *CONTENTS)
EVALUATE = Maker(evaluate, Evaluate, "protocols.json")
#: Seconds on one core of a busy x86-64 CPU to unlearn with the sets, and to evaluate a model.
TAKES = {"salun": 50.0, "esd": 104.0, "spm": 159.0, **dict.fromkeys(closed_forms, EDIT_TAKES)}
OTHERS, JUDGED = 81.0, {"spm": 68.0}  # EBU's; SPM generates five images at a time
ATTACKS_TAKE = 540.0
EVALUATED = 29.0
#: Two digits and two styles. No strength was tuned on them.
ATTACKED = ("one", "eight", "red", "outline")
#: Those of them that a base is also trained without, to see what attacks find in it.
REFERENCES = ("one", "red")
#: Fewer steps than published, so that all attacks on a model take minutes on a CPU.
SHORTENED = {
    "cce_steps": 250,
    "unlearndiffatk_timesteps": 5,
    "unlearndiffatk_iterations": 16,
    "tina_steps": 20,
    "tina_refinements": 5,
}


@dataclass(frozen=True, kw_only=True)
class Canvas(Seeds, OfWorld):
    """The targets and the methods."""

    seeds: list[int] = option(
        [1, 2, 3], help=f"Seeds of {', '.join(COMPARED)}. The other methods use only the first."
    )
    methods: list[str] = option(
        [*USUAL],
        help=f"Methods to compare. There are also {', '.join(closed_forms)}, edits in closed form, "
        "which nothing was tuned for.",
    )
    targets: list[str] = option(list(TARGETS), help="Styles and digits, each forgotten by itself.")
    attacked: list[str] = option(
        list(ATTACKED),
        nargs="*",
        help="Targets whose models of the first seed are attacked too, by every attack. SPM's are "
        "not: its adapter has another strength for each prompt.",
    )
    references: list[str] = option(
        list(REFERENCES),
        nargs="*",
        help="Targets that a base is trained without and attacked, too: the reference for depth.",
    )
    protocol: Literal["unlearncanvas-digits", "unlearncanvas-digits-seed188"] = option(
        PROTOCOL, help="Protocol that evaluates every model."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods(self.methods, closed_forms)
        for option_name in ("attacked", "references"):
            if other := [name for name in getattr(self, option_name) if name not in TARGETS]:
                raise InputError(f"--{option_name} {other[0]}: there is {', '.join(TARGETS)}")


def canvas(args: Canvas, script: str = "unlearncanvas") -> None:
    """Unlearn and evaluate the missing models, then compare all: index.html, compared.csv, and
    results.json with every figure."""
    settings = {name: args.setting(name) for name in args.targets}
    todo = [*next(iter(settings.values())).trained]
    for method in check_methods(args.methods, closed_forms):
        choice = chosen(args, method)
        seeds = args.seeds if method in COMPARED else args.seeds[:1]
        for setting in settings.values():
            todo += [evaluated(args, setting, method, choice, seed) for seed in seeds]
            if setting.target in args.attacked and method != "spm":
                todo.append(attacked(args, setting, method, choice, args.seeds[0]))
    todo += [reference(s) for name, s in settings.items() if name in args.references]
    if not args.announced(todo):
        return
    for setting in settings.values():
        setting.write_prompts()
    runs.execute(todo, args.processes)
    first = next(iter(settings.values()))
    root = first.root / script
    base = [_base(args, setting, root / "base") for setting in settings.values()][-1]
    folders = [base, *(r.folder for r in todo if r.tasks[-1].maker is EVALUATE)]
    compare(
        Compare(
            runs=[str(folder) for folder in folders],
            output_dir=root,
            names=[f"{first.base.folder}={BASE}"],
        )
    )
    found = canvas_results.results(
        canvas_results.read((folder / EVALUATE.last for folder in folders), BASE),
        json.loads((root / "compared.json").read_text(encoding="utf-8"))["ranks"],
        [_depth(r) for r in todo if r.tasks[-1].maker is ATTACK],
        # where things are means nothing to others
        replace(args, base=None, judges=None, workers=None, output_dir=OUTPUT).command(script),
    )
    with replacing(root / "results.json") as work:
        work.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def chosen(args: OfWorld, method: str) -> rows.Choice:
    """The strength for all targets: sd_tune.py's choice for digits.

    Its trials used one digit and a seed that is not reported."""
    return rows.tuned(args.setting(next(iter(CONTENTS))), method)


def evaluated(
    args: Canvas, setting: TextSetting, method: str, choice: rows.Choice, seed: int
) -> Run:
    """Unlearned, and evaluated; SPM by its adapter, which the protocol scales for each prompt."""
    kept = "lora" if known[method].forgets == "adapter" else "pipeline"
    made = _unlearned(args, setting, method, choice, seed, kept)
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
    name = f"{setting.world.name}: {judged.folder.name.rpartition('-')[0]}, {PROTOCOL}"
    makers = setting.makers(name, method, seed)
    ground = tuple(r.name for r in setting.trained)
    seconds = TAKES.get(method, OTHERS) + JUDGED.get(method, EVALUATED)
    steps = 0 if method in closed_forms else args.steps or STEPS
    return Run(name, (made, judged), seconds, steps, (*ground, *makers))


def attacked(
    args: Canvas, setting: TextSetting, method: str, choice: rows.Choice, seed: int
) -> Run:
    """Unlearned, and attacked; what `evaluated` made is there already."""
    made = _unlearned(args, setting, method, choice, seed, "pipeline")
    return _attacked(setting, made, 0.0, 0, evaluated(args, setting, method, choice, seed).name)


def reference(setting: TextSetting) -> Run:
    """Trained without the target, and attacked."""
    alone = setting.retrained()
    (made,) = alone.tasks
    return _attacked(setting, made, alone.seconds, alone.steps, *(r.name for r in setting.trained))


def _attacked(
    setting: TextSetting, made: runs.Task, seconds: float, steps: int, *after: str
) -> Run:
    label = made.folder.name.rpartition("-")[0]
    done = setting.attacked(
        made.folder / "pipeline", [made.folder.name], label, {"attacks": list(ATTACKS), **SHORTENED}
    )
    name = f"{setting.world.name}: {label}, attacked"
    return Run(name, (made, done), seconds + ATTACKS_TAKE, steps, after)


def _unlearned(
    args: Canvas, setting: TextSetting, method: str, choice: rows.Choice, seed: int, kept: str
) -> runs.Task:
    steps, name = args.steps or STEPS, tag(setting, choice, setting.trains(method))
    alone = setting.unlearned(
        f"{method}-{name}", method, seed=seed, steps=steps, options=choice.given, save_as=kept
    )
    (made,) = alone.tasks
    return made


def _depth(run: Run) -> dict[str, Any]:
    """What the attacks on a model found."""
    made, done = run.tasks
    found = json.loads((done.folder / "attacks.json").read_text(encoding="utf-8"))
    of = made.config
    retrained = made.maker is TRAIN
    target = (of.without if retrained else of.forget)[0]
    return {
        "target": target,
        "kind": "style" if target in STYLES else "object",
        "method": known["retrain" if retrained else of.method].title,
        "seed": of.seed,
        "values": found["values"],
    }


def _beside(setting: TextSetting) -> dict[str, Any]:
    return {"base": str(setting.base.folder), "files": [f"digits-judges={setting.judges.folder}"]}


def _base(args: Canvas, setting: TextSetting, folder: Path) -> Path:
    """Evaluate the base: its images are generated once and counted for each target."""
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
