"""What the scripts of the text-to-image tables and figures share, and a table at small scale;
sd_large.py makes one at the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command_line
import rows
import sd_paper
import sd_results
import tables
import torch
from runs import SD, Run
from sd_paper import SD14, WEIGHTS, PaperSetting
from sd_worlds import REGIMES, STYLED_DIGITS, SURROGATES, TextSetting
from torch import Tensor
from worlds import LOSSES, value

from ebu_optim.baselines import methods
from ebu_optim.errors import InputError
from ebu_optim.metrics.images import read_image
from ebu_optim.metrics.protocol import TEXT_TO_IMAGE
from ebu_optim.report import comparison

ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = ("ebu_added", "ebu_replaced", "joint", "selective_amnesia", "salun", "esd", "spm")
MOST = 10  # prompts in a grid
STEPS = 100  # of unlearning, at small scale
AXES = ("p_f", "ra", "ra_never_replayed", "worst_drop", "inversion_100")
TUNING = (
    "each row's; trials are sd_tune.py's, as many as the row says, in the setting it names: the "
    "same steps for each method, another target, seed 0, which is not reported, score (1 - P_f) + "
    "RA (never replayed, where that is told) - worst drop + (1 - P_f after 100 steps of inversion)"
)


def parser(doc: str | None, *, small_alone: bool = False) -> Any:
    scales = {"small": STYLED_DIGITS} if small_alone else {"small": STYLED_DIGITS, "paper": SD14}
    found = command_line.parser(doc, scales, data=False)
    add = found.add_argument_group("at --scale small").add_argument
    add("--base", type=Path, help="a pipeline of world/train.py, in place of training one")
    add("--judges", type=Path, help="folder of world/judges.py, in place of training them")
    add("--regime", choices=REGIMES, default="list", help="prompts that are remembered: 100 "
        "without the target, or those of few other concepts, so that what was never replayed "
        "can be told")  # fmt: skip
    add(
        "--loss",
        choices=LOSSES,
        default="relabel",
        help="to remember by; relabel: to forget by too",
    )
    add("--surrogate", choices=SURROGATES, default="other", help="drawn in place of the target: "
        "another concept, what the empty prompt draws (of a content, every tenth picture is the "
        "target itself), Gaussian latents")  # fmt: skip
    add("--train_modules", default="full", help="as of unlearn.py; SPM has adapters of its own")
    add("--images_per_pair", type=int, help="as of world/measure.py; default: 8, so that a "
        "content is judged on 40 or 48 pictures and a style on 72 or 80")  # fmt: skip
    add = found.add_argument
    add("--steps", type=int, help="of unlearning; default: 100, at --scale paper the paper's")
    if not small_alone:
        add = found.add_argument_group("at --scale paper").add_argument
        add("--real_images", type=Path, help="real images of the kept classes, for FID")
        add("--pretrained_model_name_or_path", help="folder or hub id of Stable Diffusion 1.4; "
            f"default: {SD14.pipeline}")  # fmt: skip
        for metric, name in WEIGHTS.items():
            add(f"--{name}", type=Path, help=f"file of what {metric} judges by; default: its "
                "download. A metric that had none is measured anew with it")  # fmt: skip
    return found


def add_methods(parser: Any) -> None:
    add = parser.add_argument
    add(
        "--methods",
        nargs="+",
        help=f"default: {', '.join(METHODS)}; at paper scale the paper's; "
        "retrain is a base of its own that never saw the target, at small scale",
    )
    add("--seeds", type=int, nargs="+", default=[1], help="of EBU, the plain sum and --best")
    add("--seeds_rest", type=int, nargs="+", help="of the others; default: --seeds")
    add("--best", nargs="+", default=["salun"], help="the best baselines")


def check_methods(given: Sequence[str]) -> list[str]:
    known = [m for m in methods if m != "embedding_only"]
    names = [ALIASES.get(m, m) for m in given]
    for m in names:
        if m not in known:
            raise InputError(f"--methods {m}: there is {', '.join(known)}")
    return list(dict.fromkeys(names))


def setting(args: Any, target: str, beside: Sequence[str] = ()) -> TextSetting:
    check(args)
    for name in ("pretrained_model_name_or_path", "real_images", *WEIGHTS.values()):
        if getattr(args, name, None) is not None:
            raise InputError(f"--{name} is of --scale paper; leave it out")
    world = args.scales[args.scale]
    if args.images_per_pair is not None:
        world = world._replace(measure=(*world.measure, "--images_per_pair", args.images_per_pair))
    return TextSetting(
        world, args.output_dir, target=target, beside=beside,
        regime=args.regime, loss=args.loss, surrogate=args.surrogate, modules=args.train_modules,
        base=args.base, judges=args.judges,
    )  # fmt: skip


def check(args: Any) -> None:
    for name in ("steps", "images_per_pair"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise InputError(f"--{name} must be >= 1; got {number}")


def table(args: Any, setting: TextSetting) -> list[tables.Row]:
    """The chosen methods, the first ones with all seeds."""
    names = check_methods(args.methods or METHODS)
    full = ("ebu_added", "joint", *check_methods(args.best))
    most = rows.check_seeds(args.seeds)
    rest = rows.check_seeds(args.seeds_rest or args.seeds)
    return [
        row(setting, m, most if m in full else rest, args.steps or STEPS)
        for m in names
    ]  # fmt: skip


def row(setting: TextSetting, method: str, seeds: Sequence[int], steps: int) -> tables.Row:
    if method == "retrain":  # one, of the base's seed
        base = rows.Choice(2e-3, {})
        run = setting.run("retrain", "retrain", seed=0)
        return tables.Row(
            rows.title(method), (run,), value(setting.world.base, "--max_train_steps"), base, "none"
        )
    chosen = tag(setting, rows.tuned(setting, method), setting.trains(method))
    return tables.row(setting, method, seeds, steps=steps, tag=chosen)


def trial(args: Any, setting: TextSetting, method: str, choice: rows.Choice) -> Run:
    """Of tuning, on seed 0."""
    steps = args.steps or STEPS
    chosen = tag(setting, choice, setting.trains(method))
    name = tables.label(setting, method, chosen, steps)
    return setting.run(name, method, seed=0, steps=steps, flags=choice.flags, trial=True)


def tag(
    setting: TextSetting | PaperSetting, choice: rows.Choice, modules: str | None = None
) -> str:
    return f"{setting.surrogate}-{modules or setting.modules}-{choice.name}"


def pictures(setting: TextSetting, found: Sequence[tables.Row]) -> list[Run]:
    """Pictures of the base's and of every row's first seed."""
    drawn = [setting.pictures(r.runs[0].commands[0].folder.name, r.runs[0]) for r in found]
    return [setting.base_pictures(), *drawn]


def run(args: Any, setting: TextSetting | PaperSetting, todo: Sequence[Run]) -> bool:
    """Say what it costs, then run what is missing; False after a --dry_run."""
    if not command_line.announce(args, setting.world, todo):
        return False
    setting.write_prompts()
    command_line.runs.execute(todo, command_line.workers(args))
    judged = [r for r in todo if len(r.commands) > 1 and r not in setting.ground]
    if isinstance(setting, PaperSetting):
        setting.write_results(judged)
    else:
        sd_results.write(setting, judged)
    return True


def small(
    args: Any, target: str, argv: Sequence[str] | None, *, script: str, title: str,
    paper: str | None = None, notes: Sequence[str] = (),
) -> Path | None:  # fmt: skip
    """A table of the world of digits in styles; its folder, or None after a --dry_run."""
    s = setting(args, target)
    found = table(args, s)
    drawn = pictures(s, found)
    if not run(args, s, [*s.ground, *(run for r in found for run in r.runs), *drawn]):
        return None
    first = found[0].runs[0]
    said = sd_results.training(s, typical(found), TUNING)
    said["unlearning"]["settings"] = tables.settings(found)
    said["unlearning"]["forget_loss"] += ": ESD and SPM forget the bare word"
    said["unlearning"]["trained"] += ", of ESD cross attention"
    name = "-".join([script, s.target, s.regime, s.loss, s.surrogate, s.modules])
    tables.report(
        s.root / name, s, found, said=said | sd_results.judging(s, first),
        limits=rows.results(first.folder)[:1], paper=paper,
        title=f"{title}: {s.target!r} forgotten, prompts remembered: {s.regime}, by {s.loss}; "
        f"instead: {s.surrogate}",
        command=command_line.typed(script, argv), notes=[*notes, *marks(found), *apart(s, found)],
        parts=TEXT_TO_IMAGE,
        plots=plots(found), grids=[grid(found, drawn, [s.target])], axes=AXES,
        one="one base model, and sets of their own", shown="Curves and pictures",
    )  # fmt: skip
    tables.say(s.root / name)
    return s.root / name


def typical(found: Sequence[tables.Row]) -> dict[str, Any]:
    """What unlearn.py wrote of a run, for the part of the protocol that most rows have in common:
    of the first that learns the surrogate's losses, or else of the first that was unlearned.

    Raises:
        InputError: there is none.
    """
    runs = [r.runs[0] for r in found if r.runs[0].commands[0].script == f"{SD}/unlearn"]
    made = [sd_results.read(run, "unlearn") for run in runs]
    if not made:
        raise InputError("--methods retrain: a table needs a method that unlearns beside it")
    plain = [m for m in made if methods[m["method"]].forgets == "surrogate"]
    return (plain or made)[0]


def apart(setting: TextSetting, found: Sequence[tables.Row]) -> list[str]:
    """A note where Retrain has not the autoencoder and the text encoder of the base: a --base that
    was trained in another way, or with other threads."""

    def weights(pipeline: Path, part: str) -> list[bytes]:
        return [f.read_bytes() for f in sorted((pipeline / part).glob("*.safetensors"))]

    commands = [r.runs[0].commands[0] for r in found]
    other = [
        part
        for part in ("vae", "text_encoder")
        for c in commands
        if c.script == f"{SD}/world/train"
        and weights(c.folder / "pipeline", part) != weights(setting.base.folder, part)
    ]
    note = (
        f"Retrain has another {' and another '.join(other)} than the base: inversion and "
        "relearning learn from the base's latents, and say nothing of it."
    )
    return [note] if other else []


def marks(found: Sequence[tables.Row]) -> list[str]:
    """Which rows forget to 0.05 and lose at most 0.02 of any other concept."""
    there = []
    for r in found:
        v = tables.gather(r)
        p_f, drop = (comparison.value(v[k]) for k in ("p_f", "worst_drop"))
        if p_f is None or drop is None:
            continue
        off = 1e-9  # of a mean of shares of pictures
        if p_f <= 0.05 + off and drop <= 0.02 + off:
            there.append(r.name)
    return [f"P_f <= 0.05 and no other content or style more than 0.02 below the base, in the "
            f"mean over seeds: {', '.join(there) or 'no row'}."]  # fmt: skip


def plots(found: Sequence[tables.Row]) -> list[dict[str, Any]]:
    """P_f along textual inversion."""
    series = {}
    for r in found:
        v = rows.results(r.runs[0].folder)[-1]["values"]
        points = [(n, comparison.value(v.get(key))) for n, key in
                  ((0, "p_f_prompts"), (100, "inversion_100"), (200, "inversion_200"))]  # fmt: skip
        series[r.name] = [(x, y) for x, y in points if y is not None]
    label = "P_f after steps of textual inversion"
    return [{"title": label, "x": "steps", "y": label, "series": series}]


def grid(
    found: Sequence[tables.Row], drawn: Sequence[Run], forgotten: Sequence[str], each: int = 100
) -> dict[str, Any]:
    """Prompts downwards, methods across, `each` pictures of a prompt; every column from the same
    noise."""
    names = ["base model", *(r.name for r in found)]
    shown = [shown_in(run, each) for run in drawn]
    texts = list(shown[0])
    return {
        "title": "pictures of every method, from the same noise", "rows": texts,
        "columns": {
            n: torch.stack([s[t] for t in texts]) for n, s in zip(names, shown, strict=True)
        },
        "forgotten": [t for t in texts if any(f" {f} " in f" {t} " for f in forgotten)],
    }  # fmt: skip


def shown_in(run: Run, each: int) -> dict[str, Tensor]:
    """Prompt -> pictures (n, 3, H, W) uint8 that evaluate.py drew first; at most ten prompts."""
    c = next(c for c in run.commands if c.script == f"{SD}/evaluate")
    files: dict[str, list[Path]] = {}
    for file, prompt in sd_paper.evaluation(c)["images"].items():
        files.setdefault(prompt, []).append(c.folder / "images" / file)
    return {
        prompt: torch.stack([read_image(f) for f in files[prompt][:each]])
        for prompt in list(files)[:MOST]
    }
