"""How the defaults were chosen: EBU's readings and its rivals on three axes, on digits.

    python examples/evidence.py --workers 2            # everything that is missing, about an hour
    python examples/evidence.py --summary              # the table and the plot of what is there

Strengths are tuned on seed 0, for each regime and remember loss; results are reported on seeds 1, 2
and 3. One JSON file a run; a second start only runs what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ebu_optim.experiments import evidence
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Evidence:
    output_dir: Path = option(Path("outputs/evidence"), help="Folder for runs and report.")
    workers: int = option(2, help="Processes, of one thread each.")
    summary: bool = option(False, help="Run nothing, and write the report of what is there.")


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
