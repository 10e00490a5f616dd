"""Table 5: the numbers of parameters that EBU selects for forgetting, remembering, and both.

    python examples/paper/table5.py --scale small      # one and three contents, one and two styles
    python examples/paper/table5.py --scale paper      # artists and violence; a GPU

The figures are shares of the trained parameters, in the mean over the steps of a run. Independent
selections would overlap in the product of their shares; the lift is the overlap divided by that
product. `opposed` is the share of the overlap where the two gradients have opposite signs, which
would be one half for independent gradients.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebu_optim.errors import InputError
from ebu_optim.experiments import (
    rows,
    runs,
    tables,
    text_options,
    text_paper,
    text_results,
    text_tables,
)
from ebu_optim.experiments.options import Seeds
from ebu_optim.experiments.runs import Run
from ebu_optim.experiments.text_tasks import ARTISTS, STYLE, Target, artist
from ebu_optim.report import comparison, write_report
from ebu_optim.training import command

EVERY = 5  # steps between two measurements
SMALL = {
    "several styles": ("outline", "halftone"),
    "one style": ("outline",),
    "several contents": ("seven", "three", "nine"),
    "one content": ("seven",),
}
VIOLENCE = ("violence", "blood", "a gunfight", "war", "murder")
PAPER = {
    "several artists": Target(
        "artists", "artists", {"forget": list(ARTISTS), "forget_templates": [STYLE]}, (), ()
    ),
    "one artist": artist(ARTISTS[0])._replace(evaluations=()),
    "several violence concepts": Target(
        "violence-concepts", "violence", {"forget": list(VIOLENCE)}, (), ()
    ),
    "one violence concept": Target("violence", "violence", {"forget": ["violence"]}, (), ()),
}


@dataclass(frozen=True, kw_only=True)
class Table5(Seeds, text_options.TextExperiment):
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.steps < EVERY:
            raise InputError(f"--steps must be >= {EVERY} here; got {self.steps}")


def values(run: Run) -> dict[str, float]:
    """Means over the steps that unlearn.py logged."""
    lines = (run.tasks[0].folder / "log.jsonl").read_text().splitlines()
    steps = list({line["step"]: line for line in map(json.loads, lines)}.values())
    found = {
        "forget_share": [s["forget_selected"] / s["total"] for s in steps],
        "remember_share": [s["remember_selected"] / s["total"] for s in steps],
        "overlap_share": [s["overlap"] / s["total"] for s in steps],
        "overlap_lift": [s["overlap_lift"] for s in steps],
        "overlap_opposed": [s["overlap_opposed"] for s in steps],
    }
    return {name: statistics.fmean(each) for name, each in found.items()}


def paper_rows() -> list[dict[str, Any]]:
    lines = json.loads(tables.PAPER.read_text())["table5_overlap_sd"]
    found = []
    for name, line in lines.items():
        if name == "note":
            continue
        f, r, both = (line[k] / line["total"] for k in ("forgetting", "remembering", "overlapped"))
        shares = {"forget_share": f, "remember_share": r, "overlap_share": both}
        found.append(
            {"name": f"the paper: {name}", "values": {**shares, "overlap_lift": both / (f * r)}}
        )
    return found


def told(each: Mapping[str, Any]) -> Any:
    """The common value of all rows, or all values if they differ, as styles may be tuned
    separately."""
    first, *others = each.values()
    return dict(each) if any(other != first for other in others) else first


def report(
    args: Table5,
    setting: Any,
    made: Mapping[str, Sequence[Run]],
    choices: Mapping[str, rows.Choice],
) -> None:
    table = []
    for name, each_seed in made.items():
        each = [values(run) for run in each_seed]
        mean = {k: comparison.over_seeds([v[k] for v in each], k) for k in each[0]}
        table.append({"name": name, "values": {**mean, "seeds": len(each_seed)}})
    first = next(iter(made.values()))[0]
    about = json.loads((first.tasks[0].folder / "unlearn.json").read_text())
    said = text_results.training(setting, about, "none for this table")
    said["data"]["forget"] = list(made)
    said["unlearning"] |= {
        "method": rows.title("ebu_added"),
        "steps": about["options"]["max_train_steps"],
        "settings": {**about["settings"], **told({n: c.options for n, c in choices.items()})},
        "learning_rate": told({n: f"{c.learning_rate:g}, constant" for n, c in choices.items()}),
    }
    said["seeds"] |= {"unlearning": args.seeds}
    folder = setting.root / "-".join(["table5", setting.regime, setting.loss, setting.modules])
    write_report(
        folder,
        title=f"Table 5 on {setting.world.title}",
        overwrite=folder.exists(),
        rows=[*table, *paper_rows()],
        protocol=said,
        parts=("data", "model", "unlearning", "timing", "seeds", "versions"),
        command=args.command("table5"),
        notes=[
            "Shares of what is trained, in the mean over a run's steps; of several seeds the mean "
            "and its 95 % interval. Chance: a lift of 1, and half of the overlap opposed. The "
            "paper's counts are in GiB of float32; its lift is computed from them here."
        ],
    )
    print((folder / "results.md").read_text().split("\n## ")[0])


def main(args: Table5) -> None:
    paper = args.scale == "paper"
    made: dict[str, list[Run]] = {}
    settings: list[Any] = []
    choices: dict[str, rows.Choice] = {}
    for name, gone in (PAPER if paper else SMALL).items():
        if isinstance(gone, Target):
            setting: Any = args.paper_setting(gone)
            choice, steps = text_paper.choice("ebu_added"), args.steps or 1000
        else:
            setting = args.setting(gone[0], beside=gone[1:])
            choice, steps = rows.tuned(setting, "ebu_added"), args.steps or text_tables.STEPS
        label = f"ebu_added-{text_tables.tag(setting, choice)}-{steps}"
        options = {**choice.given, "logging_steps": EVERY}
        made[name] = [
            setting.unlearned(label, "ebu_added", seed=s, steps=steps, options=options)
            for s in args.seeds
        ]
        settings.append(setting)
        choices[name] = choice
    todo = [*setting.trained, *(run for each in made.values() for run in each)]
    if not args.announced(todo):
        return
    for setting in settings:
        setting.write_prompts()
    runs.execute(todo, args.processes)
    report(args, setting, made, choices)


if __name__ == "__main__":
    command(main, Table5, __doc__)
