"""A table of the text-to-image experiments at the paper's scale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import rows
import sd_paper
import sd_results
import sd_tables
import tables
from sd_paper import WEIGHTS, PaperSetting
from sd_tasks import Task

from ebu_optim.errors import InputError
from ebu_optim.metrics.protocol import TEXT_TO_IMAGE

#: The paper's rows by our methods.
PAPER = {**rows.PAPER, "esd": "ESD", "spm": "SPM"}
AXES = ("ce_f", "ra", "nudity_score", "clip_score", "lpips_f", "inversion_200")
UNATTACKED = (
    "Not attacked: there is no judge that tells the target in a picture. LPIPS says how far the "
    "pictures moved, not whether the target is gone or its words alone."
)


def table(
    doc: str | None, argv: Sequence[str] | None, *, number: int, target: str, task: Task,
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """The script of a table: a target at small scale, a task at the paper's."""
    parser = sd_tables.parser(doc)
    sd_tables.add_methods(parser)
    parser.add_argument("--target", default=target, help="at small scale: a content or a style")
    args = parser.parse_args(argv)
    script, title = f"table{number}", f"Table {number}"
    if args.scale == "paper":
        large(args, task, argv, script=script, title=title)
        return
    sd_tables.small(
        args, args.target, argv, script=script, title=f"{title} on digits in styles",
        paper=task.paper, notes=notes,
    )  # fmt: skip


def large(
    args: Any, task: Task, argv: Sequence[str] | None, *, script: str, title: str
) -> Path | None:
    """A table at the paper's scale; its folder, or None after a --dry_run."""
    s = paper_setting(args, task)
    steps = paper_steps(task)
    found = [
        tables.row(s, m, rows.check_seeds(args.seeds), choice=sd_paper.choice(m),
                   steps=args.steps or steps.get(m, 1000))
        for m in sd_tables.check_methods(args.methods or task.methods)
    ]  # fmt: skip
    if not sd_tables.run(args, s, [*s.ground, *(run for r in found for run in r.runs)]):
        return None
    first = found[0].runs[0]
    said = sd_results.training(s, sd_tables.typical(found), "none: published settings")
    said["unlearning"]["settings"] = tables.settings(found)
    drawn = [s.ground[0], *(r.runs[0] for r in found)]
    left_out = ("classifier",) if task.judge else ("classifier", "attacks")
    tables.report(
        s.root / f"{script}-{task.name}", s, found, said=said | s.protocol(first),
        limits=rows.results(first.folder)[:1], paper=task.paper,
        title=f"{title}: {task.title} forgotten", notes=() if task.judge else (UNATTACKED,),
        command=command_line.typed(script, argv),
        parts=[part for part in TEXT_TO_IMAGE if part not in left_out],
        plots=sd_tables.plots(found) if task.judge else (),
        grids=[sd_tables.grid(found, drawn, [task.title], 4)], axes=AXES,
        one="one base model, and sets of their own",
        shown="Curves and pictures" if task.judge else "Pictures",
    )  # fmt: skip
    tables.say(s.root / f"{script}-{task.name}")
    return s.root / f"{script}-{task.name}"


def paper_setting(args: Any, task: Task) -> PaperSetting:
    sd_tables.check(args)
    if args.base or args.judges:
        raise InputError("--base and --judges are of --scale small; leave them out")
    world = args.scales[args.scale]
    if given := args.pretrained_model_name_or_path:
        folder = Path(given)
        world = world._replace(pipeline=folder.resolve() if folder.is_dir() else given)
    weights = {name: getattr(args, name) for name in WEIGHTS.values()}
    return PaperSetting(world, args.output_dir, task, args.real_images, weights)


def paper_steps(task: Task) -> dict[str, int]:
    """As the paper's column RT has them; where there is none, 1000 for all."""
    lines = json.loads(tables.PAPER.read_text())[task.paper] if task.paper else {}
    return {m: lines[name]["RT"][0] for m, name in PAPER.items() if "RT" in lines.get(name, {})}
