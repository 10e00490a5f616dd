"""The trials of tuning, and the choice among them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError
from ..files import replacing
from . import rows
from .runs import Run


def check_methods(given: Sequence[str], grids: rows.Grids) -> list[str]:
    """Check that the methods have strengths to tune.

    Raises:
        InputError: a method has none.
    """
    for method in given:
        if method not in grids:
            raise InputError(f"--methods {method} has no strength to tune: leave it out")
    return list(given)


def record(
    setting: Any,
    tuned: Sequence[str],
    found: Mapping[tuple[str, str], tuple[rows.Choice, Run]],
    score: Callable[[dict[str, Any]], float],
) -> None:
    """Write the best choice of each method into tuned.json in the output folder.

    Args:
        found: (method, name of a choice) -> the choice and its run.
    """
    base, file = setting.base_key, rows.own_trials(setting)
    key = rows.key(setting.tuned_as[0], setting.loss)
    known = rows.tuned_table(setting).get(key, {})
    table = json.loads(file.read_text()) if file.exists() else {}
    mine = table.setdefault(key, {})
    for method in tuned:
        scored = []
        for (of, _), (choice, run) in found.items():
            if of == method:
                values = rows.results(run.folder)[-1]["values"]
                scored.append((score(values), choice))
        best, choice = max(scored, key=lambda pair: pair[0])
        trials = {c.name: s for s, c in scored}
        before = known.get(method, {})
        if before.get("base", base) == base:  # a later, worse trial does not replace the best one
            trials = {t["choice"]: t["score"] for t in before.get("trials", ())} | trials
            if before and before["score"] > best:
                best = before["score"]
                choice = rows.Choice(before["learning_rate"], before["options"])
        mine[method] = {
            "learning_rate": choice.learning_rate,
            "options": choice.options,
            "score": best,
            "base": base,
            "trials": [{"choice": c, "score": s} for c, s in trials.items()],
        }
        print(f"{rows.title(method)}: {choice.name}, score {best:.4f}")
    with replacing(file) as work:
        work.write_text(json.dumps(table, indent=1))
    print(f"written: {file}")
