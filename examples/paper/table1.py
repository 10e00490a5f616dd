"""Table 1: class-wise forgetting on CIFAR-100 and STL-10.

    python examples/paper/table1.py --scale paper                      # GPUs
    python examples/paper/table1.py --scale small --parquet CIFAR100_FOLDER

At small scale CIFAR-100 is a run on real images that is far too short to mean much, and STL-10 is a
smoke run on generated images, whose figures mean nothing. The reports say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ebu_optim.experiments import pages, rows, settings, tables, worlds
from ebu_optim.experiments.options import OnImages, Seeds
from ebu_optim.training import command, option


@dataclass(frozen=True, kw_only=True)
class Table1(Seeds, OnImages):
    scales: ClassVar[Mapping[str, Any]] = {
        "small": {"cifar100": worlds.CIFAR100_SMALL, "stl10": worlds.STL10_SMOKE},
        "paper": {"cifar100": worlds.CIFAR100, "stl10": worlds.STL10},
    }
    dataset: list[Literal["cifar100", "stl10"]] = option(["cifar100", "stl10"], help="Data sets.")
    methods: list[str] = option(list(rows.PAPER), help="Methods to compare.")


def main(args: Table1) -> None:
    methods = rows.check_methods(args.methods)
    for name in args.dataset:
        world = args.world[name]
        # the given images belong to one data set
        data = args.data if name == "cifar100" or args.dataset == ["stl10"] else {}
        setting = settings.Setting(world, args.output_dir, data=data, trained=args.trained)
        found = tables.class_wise(
            setting, methods, args.seeds, paper=args.scale == "paper", sa_steps=0
        )
        if args.run(setting, [run for r in found for run in r.runs]):
            pages.write(
                setting.root / "table1",
                setting,
                found,
                title=f"Table 1 on {world.title}",
                command=args.command("table1"),
                paper=world.paper,
            )


if __name__ == "__main__":
    command(main, Table1, __doc__)
