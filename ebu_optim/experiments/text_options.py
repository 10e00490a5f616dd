"""The options of the text-to-image experiments: the world, the methods and the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..baselines import methods
from ..errors import InputError
from ..text_to_image.modules import Modules
from ..training.fields import at_least, option
from . import rows, runs, settings, text_results
from .options import Experiment, Seeds
from .runs import Run
from .text_paper import SD14, WEIGHTS, PaperSetting, PaperWorld
from .text_scales import FLOW_DIGITS, STYLED_DIGITS
from .text_tasks import Target
from .text_worlds import TextSetting

ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = ("ebu_added", "ebu_replaced", "joint", "selective_amnesia", "salun", "esd", "spm")
SMALL = "at --scale small"
PAPER_SCALE = "at --scale paper"


@dataclass(frozen=True, kw_only=True)
class OfWorld(Experiment):
    """An experiment in the world of digits in styles.

    Raises:
        InputError: a value is out of range.
    """

    group: ClassVar[str] = SMALL
    scales: ClassVar[Mapping[str, Any]] = {"small": STYLED_DIGITS, "flow": FLOW_DIGITS}

    base: Path | None = option(None, help="A pipeline of world/train.py, instead of training one.")
    judges: Path | None = option(
        None, help="A folder of world/judges.py, instead of training the judges."
    )
    regime: Literal["list", "few"] = option(
        "list",
        help="Prompts to remember. list: 100 without the target; few: those of a few other "
        "concepts, which shows what happens to concepts that are never replayed.",
    )
    loss: settings.Loss = option("relabel", help="Remember loss; relabel is a forget loss, too.")
    surrogate: Literal["other", "empty", "gaussian"] = option(
        "other",
        help="What the model learns to generate instead of the target: another concept, images of "
        "the empty prompt (for a digit, every tenth is the target itself), or Gaussian latents.",
    )
    train_modules: Modules = option(
        "full", help="Weights that are trained, as in unlearn.py. SPM has its own adapters."
    )
    images_per_pair: int | None = option(
        None,
        help="Images of each digit in each style, as in world/measure.py. Default: 8, "
        "which gives 40 or 48 images per content and 72 or 80 per style.",
    )
    steps: int | None = option(
        None, help="Steps of unlearning. Default: 100; at --scale paper the paper's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "images_per_pair")

    def setting(self, target: str, beside: Sequence[str] = ()) -> TextSetting:
        world = self.world
        if self.images_per_pair is not None:
            measure = {**world.measure, "images_per_pair": self.images_per_pair}
            world = world._replace(measure=measure)
        return TextSetting(
            world,
            self.output_dir,
            target=target,
            beside=beside,
            regime=self.regime,
            loss=self.loss,
            surrogate=self.surrogate,
            modules=self.train_modules,
            base=self.base,
            judges=self.judges,
        )

    def run(self, setting: TextSetting | PaperSetting, todo: Sequence[Run]) -> bool:
        """Print the cost and make the missing runs; False after a --dry_run."""
        if not self.announced(todo, setting.world):
            return False
        setting.write_prompts()
        runs.execute(todo, self.processes)
        judged = [r for r in todo if len(r.tasks) > 1 and r not in setting.ground]
        if isinstance(setting, PaperSetting):
            setting.write_results(judged)
        else:
            text_results.write(setting, judged)
        return True


FILE = "File of {}'s weights. Default: a download; without weights the metric is not computed yet."


@dataclass(frozen=True, kw_only=True)
class TextExperiment(OfWorld):
    """An experiment in that world, or on Stable Diffusion 1.4.

    Raises:
        InputError: an option belongs to the other scale.
    """

    group: ClassVar[str] = PAPER_SCALE
    scales: ClassVar[Mapping[str, Any]] = {**OfWorld.scales, "paper": SD14}

    real_images: Path | None = option(None, help="Folder of real images of kept classes, for FID.")
    pretrained_model_name_or_path: str | None = option(
        None, help=f"Folder or hub id of Stable Diffusion 1.4. Default: {SD14.pipeline}."
    )
    resnet_weights: Path | None = option(None, help=FILE.format("ResNet-50"))
    clip_weights: Path | None = option(None, help=FILE.format("CLIP"))
    alexnet_weights: Path | None = option(None, help=FILE.format("AlexNet"))
    inception_weights: Path | None = option(None, help=FILE.format("Inception"))

    def __post_init__(self) -> None:
        super().__post_init__()
        others: tuple[str, ...] = ("base", "judges")
        if self.scale != "paper":
            others = ("pretrained_model_name_or_path", "real_images", *WEIGHTS.values())
        for name in others:
            if getattr(self, name) is not None:
                of = "small" if self.scale == "paper" else "paper"
                raise InputError(f"--{name} is for --scale {of}; leave it out")

    def paper_setting(self, target: Target) -> PaperSetting:
        world: PaperWorld = self.world
        if given := self.pretrained_model_name_or_path:
            folder = Path(given)
            world = world._replace(pipeline=folder.resolve() if folder.is_dir() else given)
        weights = {name: getattr(self, name) for name in WEIGHTS.values()}
        return PaperSetting(world, self.output_dir, target, self.real_images, weights)


@dataclass(frozen=True, kw_only=True)
class Chosen(TextExperiment):
    """An experiment with a choice of methods; a subclass defines their seeds.

    Raises:
        InputError: there is no such method.
    """

    methods: list[str] | None = option(
        None,
        help=f"Methods to compare. Default: {', '.join(METHODS)}; at paper scale the paper's. "
        "retrain, only at small scale, is a base model that never saw the target.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_methods(self.methods or ())

    def seeds_of(self, method: str) -> Sequence[int]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Methods(Seeds, Chosen):
    """An experiment with methods and seeds, with more seeds for the rows that are compared.

    Raises:
        InputError: there is no such method, or a seed is given twice.
    """

    seeds: list[int] = option([1], help="Seeds of EBU, the plain sum and --best.")
    seeds_rest: list[int] | None = option(
        None, help="Seeds of the other methods. Default: those of --seeds."
    )
    best: list[str] = option(["salun"], help="The best baselines, which get all seeds.")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows.check_seeds(self.seeds_rest or self.seeds, "--seeds_rest")
        check_methods(self.best)

    def seeds_of(self, method: str) -> Sequence[int]:
        full = ("ebu_added", "joint", *check_methods(self.best))
        return self.seeds if method in full else self.seeds_rest or self.seeds


def check_methods(given: Sequence[str], also: Iterable[str] = ()) -> list[str]:
    """The methods by their names in the package, without duplicates.

    Args:
        also: further methods that are known here, such as those in closed form.

    Raises:
        InputError: there is no such method.
    """
    known = [*(m for m in methods if m != "embedding_only"), *also]
    names = [ALIASES.get(m, m) for m in given]
    for m in names:
        if m not in known:
            raise InputError(f"--methods {m}: no such method; give one of {', '.join(known)}")
    return list(dict.fromkeys(names))
