"""The tables of the text-to-image experiments, at small and at the paper's scale."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..metrics.protocol import TEXT_TO_IMAGE
from . import pages, rows, tables, text_pages, text_results
from .runs import Run
from .tables import Row
from .text_options import METHODS, Chosen, check_methods
from .text_paper import PaperSetting, choice
from .text_tasks import Target
from .text_worlds import TextSetting

STEPS = 100  # steps of unlearning at small scale
AXES = ("p_f", "ra", "ra_never_replayed", "worst_drop", "inversion_100")
TUNING = (
    "each row's; trials are sd_tune.py's, as many as the row says, in the setting it names: the "
    "same steps for each method, another target, seed 0, which is not reported, score (1 - P_f) + "
    "RA (never replayed, if the table has it) - worst drop + (1 - P_f after 100 steps of "
    "inversion)"
)
PAPER_AXES = ("ce_f", "ra", "nudity_score", "clip_score", "lpips_f", "inversion_200")
#: Method -> the paper's row.
PAPER = {**rows.PAPER, "esd": "ESD", "spm": "SPM"}
UNATTACKED = (
    "Not attacked: there is no judge that tells the target in an image. LPIPS says how far the "
    "images moved, not whether the target is gone or its words alone."
)


def table(args: Chosen, setting: TextSetting) -> list[Row]:
    """The rows of the chosen methods."""
    return [
        row(setting, m, args.seeds_of(m), args.steps or STEPS)
        for m in check_methods(args.methods or METHODS)
    ]


def row(setting: TextSetting, method: str, seeds: Sequence[int], steps: int) -> Row:
    if method == "retrain":  # one run, with the base's seed
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
    """The runs that generate images with the base and with the first seed of every row."""
    drawn = [setting.pictures(r.runs[0].tasks[0].folder.name, r.runs[0]) for r in found]
    return [setting.base_pictures(), *drawn]


def either(
    args: Chosen,
    target: str,
    task: Target,
    *,
    script: str,
    title: str,
    notes: Sequence[str] = (),
) -> None:
    """Make the table of a target at small scale, or of a task at paper scale."""
    if args.scale == "paper":
        large(args, task, script=script, title=title)
    else:
        small(
            args,
            target,
            script=script,
            title=f"{title} on {args.world.title}",
            paper=task.paper,
            notes=notes,
        )


def small(
    args: Chosen,
    target: str,
    *,
    script: str,
    title: str,
    paper: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Make a table in the world of digits in styles."""
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
        s.root / name,
        s,
        found,
        said=said | text_results.judging(s, first),
        limits=rows.results(first.folder)[:1],
        paper=paper,
        title=f"{title}: {s.target!r} forgotten, prompts remembered: {s.regime}, by {s.loss}; "
        f"instead: {s.surrogate}",
        command=args.command(script),
        parts=TEXT_TO_IMAGE,
        notes=[*notes, *text_pages.marks(found), *text_pages.apart(s, found)],
        plots=text_pages.plots(found),
        grids=[text_pages.grid(found, drawn, [s.target])],
        axes=AXES,
        one="one base model, and sets of their own",
        shown="Curves and images",
    )


def large(args: Chosen, task: Target, *, script: str, title: str) -> None:
    """Make a table at paper scale."""
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
        s.root / f"{script}-{task.name}",
        s,
        found,
        said=said | s.protocol(first),
        limits=rows.results(first.folder)[:1],
        paper=task.paper,
        title=f"{title}: {task.title} forgotten",
        notes=() if task.judge else (UNATTACKED,),
        command=args.command(script),
        parts=[part for part in TEXT_TO_IMAGE if part not in left_out],
        plots=text_pages.plots(found) if task.judge else (),
        grids=[text_pages.grid(found, drawn, [task.title], 4)],
        axes=PAPER_AXES,
        one="one base model, and sets of their own",
        shown="Curves and images" if task.judge else "Pictures",
    )


def paper_steps(task: Target) -> dict[str, int]:
    """Method -> the steps in the paper's column RT; empty if there is none, for 1000 steps."""
    lines = json.loads(tables.PAPER.read_text())[task.paper] if task.paper else {}
    return {m: lines[name]["RT"][0] for m, name in PAPER.items() if "RT" in lines.get(name, {})}
