"""How the defaults were chosen: EBU's variants and its rivals on three axes, on digits.

    python examples/evidence.py --workers 2            # all missing runs, about an hour
    python examples/evidence.py --summary              # table and plot of the finished runs

Strengths are tuned on seed 0, for each regime and remember loss. Results are reported on seeds 1, 2
and 3. Each run has one JSON file, and a second start only makes the missing runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ebu_optim.experiments import evidence
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Evidence:
    output_dir: Path = option(Path("outputs/evidence"), help="Folder for runs and report.")
    workers: int = option(2, help="Number of processes, with one thread each.")
    summary: bool = option(False, help="Run nothing, and write the report of the finished runs.")


def main(args: Evidence) -> None:
    folder = args.output_dir
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    if not args.summary:
        evidence.replay(folder)
        evidence.execute(evidence.tuning(), folder, args.workers, "tuning")
        done = evidence.load(folder)
        evidence.execute(evidence.reporting(done), folder, args.workers, "reporting")
    evidence.write(folder)


if __name__ == "__main__":
    command(main, Evidence, __doc__)
