"""Choose every method's strength and learning rate by six trials on seed 0, which is not reported
(more with more --learning_rates).

    python examples/paper/tune.py --scale small --loss crossed

Under partial replay, where methods differ. The choice with the best score = (1 - P_f) + accuracy on
the classes that were never replayed + (1 - P_f after 100 steps of inversion) goes into tuned.json,
which the other scripts of this folder read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import command_line
import rows
from runs import Run
from worlds import LOSSES

from ebu_optim.files import replacing

TUNED_METHODS = (*rows.EBU, *rows.RIVALS)


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="replay")
    parser.add_argument("--methods", nargs="+", default=list(TUNED_METHODS))
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=list(rows.RATES),
        help="of methods with a strength of their own; earlier trials on the same base count too",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for method in rows.check_methods(args.methods):
        if method not in rows.GRIDS:
            raise command_line.InputError(f"--methods {method} has no strength to tune")
    setting = command_line.setting(args, regime="partial", loss=args.loss)
    found = {
        (method, choice.name): (
            choice,
            setting.run(
                f"{method}-partial-{args.loss}-{choice.name}", method, seed=0,
                flags=choice.flags, trial=True,
            ),
        )
        for method in args.methods
        for choice in rows.trials(method, args.learning_rates)
    }  # fmt: skip
    todo = [*setting.ground, *(run for _, run in found.values())]
    if not command_line.run(args, setting, todo):
        return
    record(setting, args.methods, found, rows.score)


def record(
    setting: Any, tuned: Sequence[str], found: Mapping[tuple[str, str], tuple[rows.Choice, Run]],
    score: Callable[[dict[str, Any]], float],
) -> None:  # fmt: skip
    """The best choice of each method into tuned.json; `found`: (method, choice's name) -> both."""
    table = json.loads(rows.TUNED.read_text()) if rows.TUNED.exists() else {}
    base = setting.base_key
    mine = table.setdefault(rows.key(setting.tuned_as[0], setting.loss), {})
    for method in tuned:
        scored = []
        for (of, _), (choice, run) in found.items():
            if of == method:
                values = rows.results(run.folder)[-1]["values"]
                scored.append((score(values), choice))
        best, choice = max(scored, key=lambda pair: pair[0])
        trials = {c.name: s for s, c in scored}
        before = mine.get(method, {})
        if before.get("base", base) == base:  # a worse rate tried later takes nothing back
            trials = {t["choice"]: t["score"] for t in before.get("trials", ())} | trials
            if before and before["score"] > best:
                best = before["score"]
                choice = rows.Choice(before["learning_rate"], before["options"])
        mine[method] = {
            "learning_rate": choice.learning_rate, "options": choice.options, "score": best,
            "base": base, "trials": [{"choice": c, "score": s} for c, s in trials.items()],
        }  # fmt: skip
        print(f"{rows.title(method)}: {choice.name}, score {best:.4f}")
    with replacing(rows.TUNED) as work:
        work.write_text(json.dumps(table, indent=1))
    print(f"written: {rows.TUNED}")


if __name__ == "__main__":
    command_line.main(main)
