"""The cost of depth: the quickstart's digits, forgotten with and without adversarial embeddings.

    python examples/paper/depth.py                     # all missing runs, about an hour
    python examples/paper/depth.py --summary           # the table of the finished runs

Each run has one JSON file, and a second start only makes the missing runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ebu_optim.baselines import methods
from ebu_optim.errors import InputError
from ebu_optim.experiments import depth
from ebu_optim.experiments.evidence import execute, load
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Depth:
    output_dir: Path = option(Path("outputs/depth"), help="Folder for runs and results.")
    rules: list[str] = option(["joint", "ebu_added", "salun"], help="Update rules to compare.")
    depths: list[str] = option(
        ["none", "adversary", "adversary-1"], choices=list(depth.DEPTHS), help="Options of depth."
    )
    seeds: list[int] = option([1, 2, 3], help="Seeds of unlearning.")
    workers: int = option(1, help="Number of processes, with one thread each.")
    summary: bool = option(False, help="Run nothing, and write the results of the finished runs.")

    def __post_init__(self) -> None:
        for rule in self.rules:
            if rule not in methods or methods[rule].forgets not in ("surrogate", "relabel"):
                raise InputError(
                    f"--rules {rule}: this is not a method that can forget by relabelling; leave "
                    "it out"
                )


def main(args: Depth) -> None:
    folder = args.output_dir
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if not args.summary:
        depth.prepare(folder)
        wanted = depth.specs(args.rules, args.depths, args.seeds)
        execute(wanted, folder, args.workers, "depth", run=depth.run, name=depth.name)
    found = load(folder)
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    said = f"{depth.table(found)}\n{depth.differences(found)}"
    (folder / "results.md").write_text(said)
    print(said)


if __name__ == "__main__":
    command(main, Depth, __doc__)
