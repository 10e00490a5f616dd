"""Rules compared on a language model that forgets invented people; docs/language_model.md.

    python examples/paper/language.py                       # everything that is missing
    python examples/paper/language.py --losses npo --rules joint ebu_routed
    python examples/paper/language.py --summary             # the tables of what is there

First come twelve trials a rule and loss on seed 100, then the runs that are reported, with the
strengths that these chose. One JSON file a run; a second start only runs what is missing. About
ten seconds a run on one idle CPU core.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ebu_optim.errors import InputError
from ebu_optim.experiments import language
from ebu_optim.experiments.evidence import execute, load
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Language:
    output_dir: Path = option(Path("outputs/language"), help="Folder for runs and results.")
    losses: list[str] = option(
        list(language.LOSSES), choices=list(language.LOSSES), help="Forget losses to compare."
    )
    rules: list[str] = option(
        list(language.RULES), choices=list(language.RULES), help="Update rules to compare."
    )
    seeds: list[int] = option(list(language.SEEDS), help="Seeds that are reported.")
    workers: int = option(1, help="Processes, of one thread each.")
    summary: bool = option(False, help="Run nothing, and write the tables of what is there.")

    def __post_init__(self) -> None:
        if language.TUNE_SEED in self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"--seeds {' '.join(map(str, self.seeds))}: give each once, and not "
                f"{language.TUNE_SEED}, which strengths are chosen on"
            )


def main(args: Language) -> None:
    folder = args.output_dir
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if not args.summary:
        language.prepare(args.seeds, folder)
        trials = language.trials(args.losses, args.rules)
        execute(trials, folder, args.workers, "trials", run=language.run, name=language.name)
        wanted = language.reported(load(folder), args.losses, args.rules, args.seeds)
        execute(wanted, folder, args.workers, "reported", run=language.run, name=language.name)
    found = language.current(load(folder))
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    said = language.report(found)
    (folder / "results.md").write_text(said)
    print(said)


if __name__ == "__main__":
    command(main, Language, __doc__)
