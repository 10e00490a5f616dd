"""Table 1: class-wise forgetting on CIFAR-100 and STL-10.

    python examples/paper/table1.py --scale paper                      # GPUs
    python examples/paper/table1.py --scale small --data=--parquet --data=CIFAR100_FOLDER

At small scale: CIFAR-100 in a run that is far too short to mean much, on real images, and STL-10
as a smoke run on generated images, whose figures mean nothing. Each says so in its report.
"""

from __future__ import annotations

import command_line
import rows
import table6
import tables
import worlds

SCALES = {
    "small": {"cifar100": worlds.CIFAR100_SMALL, "stl10": worlds.STL10_SMOKE},
    "paper": {"cifar100": worlds.CIFAR100, "stl10": worlds.STL10},
}
#: The paper's rows.
METHODS = tuple(rows.PAPER)


def main(argv: list[str] | None = None) -> None:
    parser = command_line.parser(__doc__, SCALES)
    parser.add_argument("--dataset", choices=("cifar100", "stl10"), nargs="+",
                        default=["cifar100", "stl10"])  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args(argv)
    methods, seeds = rows.check_methods(args.methods), rows.check_seeds(args.seeds)
    for name in args.dataset:
        world = SCALES[args.scale][name]
        # a folder of --data has the images of one data set
        data = args.data if name == "cifar100" or args.dataset == ["stl10"] else []
        setting = worlds.Setting(world, args.output_dir, data=data)
        found = table6.table(setting, methods, seeds, paper=args.scale == "paper", sa_steps=0)
        todo = [*setting.ground, *(run for r in found for run in r.runs)]
        if not command_line.run(args, setting, todo):
            continue
        folder = setting.root / "table1"
        tables.write(
            folder, setting, found, paper=world.paper, title=f"Table 1 on {world.title}",
            command=command_line.typed("table1", argv),
        )  # fmt: skip
        tables.say(folder)


if __name__ == "__main__":
    command_line.main(main)
