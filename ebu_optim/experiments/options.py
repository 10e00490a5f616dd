"""Common parts of the experiments: options, the announcement of the cost, and running."""

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
from . import rows, runs, settings, worlds

OUTPUT = Path("outputs/paper")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The options of every experiment.

    Raises:
        InputError: there is no such scale, or the number of workers is below 1.
    """

    #: Scale -> its world.
    scales: ClassVar[Mapping[str, Any]]

    scale: str = option("small", help="The world, as listed above.")
    output_dir: Path = option(OUTPUT, help="Folder for all runs and the report.")
    workers: int | None = option(None, help="Runs at a time. Default: one per core, or 1 on a GPU.")
    dry_run: bool = option(False, help="Print the cost, and stop.")

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        if self.scale not in self.scales:
            raise InputError(
                f"--scale {self.scale}: no such scale; give one of {', '.join(self.scales)}"
            )

    @property
    def world(self) -> Any:
        return self.scales[self.scale]

    @property
    def processes(self) -> int:
        import torch

        return self.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)

    def command(self, script: str) -> str:
        """The command that repeats the experiment, for its report."""
        return shlex.join(["python", f"examples/paper/{script}.py", *flags(self)])

    def announced(self, todo: Sequence[runs.Run], world: Any = None) -> bool:
        """Print the cost; False after a --dry_run."""
        world = world or self.world
        print(f"{world.title}: {runs.cost(todo, self.processes, world.basis)}")
        if world.smoke:
            print(f"note: {world.smoke}")
        return not self.dry_run


@dataclass(frozen=True, kw_only=True)
class OnImages(Experiment):
    """An experiment with class-conditional models. The images can come from another place than the
    hub."""

    scales: ClassVar[Mapping[str, Any]] = {
        "small": worlds.DIGITS,
        "cifar16": worlds.CIFAR16,
        "cifar10-16": worlds.CIFAR10_16,
        "paper": worlds.CIFAR10,
    }

    scale: str = option("small", help=worlds.__doc__)
    parquet: list[Path] | None = option(
        None, help="Parquet files of the same images, if not from the hub.", exclusive="source"
    )
    train_data_dir: Path | None = option(
        None, help="Folder of the same images, with one folder per class.", exclusive="source"
    )
    trained: Path | None = option(
        None,
        help="Another --output_dir whose base and judges are used, if they are those of the same "
        "settings, instead of training them.",
    )

    @property
    def data(self) -> dict[str, Any]:
        """The given options of DataOptions; empty: those of the world are used."""
        given = {"parquet": self.parquet, "train_data_dir": self.train_data_dir}
        return {k: v for k, v in given.items() if v}

    def setting(self, **options: Any) -> settings.Setting:
        given = {"data": self.data, "trained": self.trained, **options}
        return settings.Setting(self.world, self.output_dir, **given)

    def run(self, setting: settings.Setting, todo: Sequence[runs.Run]) -> bool:
        """Print the cost and make the missing runs; False after a --dry_run."""
        todo = [*setting.ground, *todo]
        if not self.announced(todo, setting.world):
            return False
        self._same_images(setting.root)
        first = next((r for r in todo if r not in setting.ground and not r.done), None)
        if self.processes > 1 and first and not base_drawn(setting):
            # the first run evaluates and attacks the base model for all others
            runs.execute([*setting.ground, first], self.processes)
        runs.execute(todo, self.processes)
        return True

    def _same_images(self, root: Path) -> None:
        """Check that the images are those of the first start.

        The hashes of the folders do not include where the images are, so that other images would
        go unnoticed."""
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


def base_drawn(setting: settings.Setting) -> bool:
    """Whether an evaluation with this base model, and not an earlier one, has finished."""
    made = setting.base.folder / setting.base.maker.last
    attacks = (setting.root / "samples").glob("*.json")
    return made.exists() and any(p.stat().st_mtime > made.stat().st_mtime for p in attacks)


@dataclass(frozen=True, kw_only=True)
class Forgetting(OnImages):
    """An experiment in which another class than the scale's can be forgotten.

    Raises:
        InputError: the scale has no such class.
    """

    forget: str | None = option(None, help="The class to forget. Default: that of the scale.")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = super().world.classes
        if self.forget is not None and known and self.forget not in known:
            raise InputError(
                f"--forget {self.forget}: --scale {self.scale} has no such class; give one of "
                f"{', '.join(known)}"
            )

    @property
    def world(self) -> worlds.World:
        world: worlds.World = super().world
        if self.forget is None:
            return world
        replayed = tuple(c for c in world.partial if c != self.forget)
        return world._replace(forget=self.forget, partial=replayed)


@dataclass(frozen=True, kw_only=True)
class Replayed(Forgetting):
    """An experiment with a choice of the replayed classes and the remember loss."""

    regime: Literal["full", "partial"] = option(
        "full", help="Replay all kept classes, or three of them."
    )
    loss: settings.Loss = option(
        "replay", help="Remember loss; relabel also forgets by relabelling."
    )

    def setting(self, **options: Any) -> settings.Setting:
        return super().setting(regime=self.regime, loss=self.loss, **options)

    def said(self, what: str, world: worlds.World) -> str:
        """A title for a report."""
        gone = "" if self.forget is None else f", {self.forget} forgotten"
        return f"{what} on {world.title}{gone}: {self.regime} replay, remembered by {self.loss}"


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """The seeds of unlearning.

    Raises:
        InputError: a seed is given twice, or strengths were chosen on it.
    """

    seeds: list[int] = option([1], help="Seeds of unlearning.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        rows.check_seeds(self.seeds)
