"""What the experiments share: their options, what they say beforehand, and how they are run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..errors import InputError
from ..files import replacing
from ..manifest import contents, refuse_changed
from ..training.fields import at_least, flags, option
from . import rows, runs, worlds


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What each of them has.

    Raises:
        InputError: a scale that there is not; no process to work.
    """

    #: Scale -> what is run at it.
    scales: ClassVar[Mapping[str, Any]]

    scale: str = option("small", help="Which world, as listed above.")
    output_dir: Path = option(Path("outputs/paper"), help="Folder for all runs and the report.")
    workers: int | None = option(None, help="Runs at a time. Default: one a core, or 1 on a GPU.")
    dry_run: bool = option(False, help="Print what it would cost, and stop.")

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        if self.scale not in self.scales:
            raise InputError(f"--scale {self.scale}: there is {', '.join(self.scales)}")

    @property
    def world(self) -> Any:
        return self.scales[self.scale]

    @property
    def processes(self) -> int:
        import torch

        return self.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)

    def command(self, script: str) -> str:
        """What repeats it, for its report."""
        return shlex.join(["python", f"examples/paper/{script}.py", *flags(self)])

    def announced(self, todo: Sequence[runs.Run], world: Any = None) -> bool:
        """Say what it costs; False where that is all that is wanted."""
        world = world or self.world
        print(f"{world.title}: {runs.cost(todo, self.processes, world.basis)}")
        if world.smoke:
            print(f"note: {world.smoke}")
        return not self.dry_run


@dataclass(frozen=True, kw_only=True)
class OnImages(Experiment):
    """Of class-conditional models; the images may be elsewhere than on the hub."""

    scales: ClassVar[Mapping[str, Any]] = {
        "small": worlds.DIGITS,
        "cifar16": worlds.CIFAR16,
        "paper": worlds.CIFAR10,
    }

    scale: str = option("small", help=worlds.__doc__)
    parquet: list[Path] | None = option(
        None, help="Parquet files of the same images, if not from the hub.", exclusive="source"
    )
    train_data_dir: Path | None = option(
        None, help="Folder of the same images, with a folder for each class.", exclusive="source"
    )

    @property
    def data(self) -> dict[str, Any]:
        """Options of DataOptions; none: those of the world."""
        given = {"parquet": self.parquet, "train_data_dir": self.train_data_dir}
        return {k: v for k, v in given.items() if v}

    def setting(self, **options: Any) -> worlds.Setting:
        return worlds.Setting(self.world, self.output_dir, **{"data": self.data, **options})

    def run(self, setting: worlds.Setting, todo: Sequence[runs.Run]) -> bool:
        """Say what it costs, then run what is missing; False after a --dry_run."""
        todo = [*setting.ground, *todo]
        if not self.announced(todo, setting.world):
            return False
        self._same_images(setting.root)
        first = next((r for r in todo if r not in setting.ground and not r.done), None)
        if self.processes > 1 and first and not base_drawn(setting):
            # it draws and attacks the base model, for all the others
            runs.execute([*setting.ground, first], self.processes)
        runs.execute(todo, self.processes)
        return True

    def _same_images(self, root: Path) -> None:
        """Where images lie is in no folder's hash: other images would pass for the first."""
        paths = [*(self.parquet or ()), *([self.train_data_dir] if self.train_data_dir else ())]
        files = [f for p in paths for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()]
        if not files:
            return
        mark, now = root / "images.json", {"images": contents(files)}
        if mark.exists():
            refuse_changed(json.loads(mark.read_text()), now, f"--output_dir: what is in {root}")
        else:
            with replacing(mark) as work:
                work.write_text(json.dumps(now))


def base_drawn(setting: worlds.Setting) -> bool:
    """Whether an evaluation has finished with this base model, and not with one before it."""
    made = setting.base.folder / setting.base.maker.last
    attacks = (setting.root / "samples").glob("*.json")
    return made.exists() and any(p.stat().st_mtime > made.stat().st_mtime for p in attacks)


@dataclass(frozen=True, kw_only=True)
class Replayed(OnImages):
    """With a choice of what is replayed, and of the remember loss."""

    regime: Literal["full", "partial"] = option(
        "full", help="Replay all kept classes, or three of them."
    )
    loss: worlds.Loss = option("replay", help="Remember loss; relabel also forgets by relabelling.")

    def setting(self, **options: Any) -> worlds.Setting:
        return super().setting(regime=self.regime, loss=self.loss, **options)

    def said(self, what: str, world: worlds.World) -> str:
        """A title."""
        return f"{what} on {world.title}: {self.regime} replay, remembered by {self.loss}"


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of unlearning.

    Raises:
        InputError: one that is given twice, or on which strengths were chosen.
    """

    seeds: list[int] = option([1], help="Seeds of unlearning.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        rows.check_seeds(self.seeds)
