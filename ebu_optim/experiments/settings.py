"""A world in a folder: the tasks of its base model and judges, and how a method is run in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..baselines import methods
from ..class_conditional.evaluation import Evaluation, evaluate
from ..class_conditional.options import Train, TrainClassifier, Unlearn
from ..class_conditional.sets import Prepare, prepare
from ..class_conditional.train import train
from ..class_conditional.train_classifier import train_classifier
from ..class_conditional.unlearn import unlearn
from ..worlds.shapes import Shapes, draw_all
from .runs import Maker, Options, Run, Task, task
from .worlds import DIGITS, World

SHAPES = Maker(draw_all, Shapes, "README.md")
TRAIN = Maker(train, Train, "README.md")
TRAIN_CLASSIFIER = Maker(train_classifier, TrainClassifier, "classifier.json")
PREPARE = Maker(prepare, Prepare, "fisher.safetensors")
UNLEARN = Maker(unlearn, Unlearn, "README.md")
EVALUATE = Maker(evaluate, Evaluation, "results.json")

Loss = Literal["replay", "distill", "crossed", "relabel"]
#: Remember loss, and for the last one also the forget loss, as options of unlearning.
LOSSES: Mapping[str, Options] = {
    "replay": {"remember": "replay"},
    "distill": {"remember": "distill"},
    "crossed": {"remember": "crossed"},
    "relabel": {"remember": "crossed", "forget_loss": "relabel"},
}


class Setting:
    """A world in a folder, with a regime (which classes are replayed) and a remember loss.

    Args:
        data: options of `DataOptions` that find the same images elsewhere.
        trained: a folder like `root` with a base and judges, which are not trained again.
    """

    def __init__(
        self,
        world: World,
        root: Path,
        *,
        regime: str = "full",
        loss: str = "replay",
        data: Options | None = None,
        trained: Path | None = None,
    ) -> None:
        self.trained = trained and trained / world.name
        self.world, self.root, self.regime, self.loss = world, root / world.name, regime, loss
        self.where = data or world.source
        self.tuned_as = [world.name, DIGITS.name]  # names under which tune.py saves strengths
        self.made: Task | None = None
        if world.generated and not data:
            self.made = task(SHAPES, world.generated, self.root, "images")
        self.base = self._trained(TRAIN, world.base, "base")
        self.base_key = self.base.folder.name
        self.judge = self._trained(TRAIN_CLASSIFIER, world.judge, "judge")
        self.reject = self._trained(
            TRAIN_CLASSIFIER, {**world.judge, "reject": True}, "judge-reject"
        )
        replay = {"replay_classes": list(world.partial)} if regime == "partial" else {}
        self.sets = self._of_images(
            PREPARE,
            {**self._model(self.base), "forget": [world.forget], **replay, **world.sets},
            f"sets-{regime}",
        )

    def _model(self, of: Task) -> Options:
        return {"pretrained_model_name_or_path": of.folder}

    def _trained(self, maker: Maker, options: Options, name: str) -> Task:
        """A task that trains on images, in the folder of an earlier run if that has finished."""
        made = self._of_images(maker, options, name)
        if self.trained and not made.done:
            earlier = made._replace(folder=self.trained / made.folder.name)
            return earlier if earlier.done else made
        return made

    def _of_images(self, maker: Maker, options: Options, name: str) -> Task:
        """A task that reads images. Generated images are part of its hash."""
        made = {"train_data_dir": self.made.folder} if self.made else {}
        return task(maker, {**self.world.images, **made, **options}, self.root, name, self.where)

    @property
    def ground(self) -> list[Run]:
        """The runs that every run of a method builds on."""
        w, s = self.world, self.world.seconds
        steps, n = w.base["max_train_steps"], w.judge.get("max_train_steps", 1600)
        per = s["train_classifier"] * n
        made = [Run(self._name("images"), (self.made,), 1.0, 0)] if self.made else []
        after = tuple(r.name for r in made)
        return [
            *made,
            Run(self._name("base"), (self.base,), s["train"] * steps, steps, after),
            Run(self._name("judge"), (self.judge,), per, n, after),
            Run(self._name("judge who knows noise"), (self.reject,), per * 1.5, n, after),
            Run(
                self._name(f"sets, {self.regime} replay"),
                (self.sets,),
                s["prepare"],
                0,
                (self._name("base"),),
            ),
        ]

    def run(
        self,
        name: str,
        method: str,
        *,
        seed: int,
        steps: int = 200,
        options: Options | None = None,
        trial: bool = False,
    ) -> Run:
        """The run that unlearns with a method and evaluates the result.

        Args:
            options: further options of unlearning.
            trial: a trial of tuning, without a curve, and attacked only by 100 steps of inversion.
        """
        w = self.world
        given = {
            **self._model(self.base),
            "prepared_dir": self.sets.folder,
            "method": method,
            **losses(self.loss, method),
            "seed": seed,
            "max_train_steps": steps,
            **w.unlearn,
            **(options or {}),
            **({} if trial else {"classifier": self.reject.folder}),
        }
        label = f"models/{name}-s{seed}"
        if method == "retrain":
            made = self._of_images(UNLEARN, given, label)
        else:
            made = task(UNLEARN, given, self.root, label)
        judged = self._of_images(
            EVALUATE,
            {
                **self._model(made),
                "classifier": self.judge.folder,
                "reject_classifier": self.reject.folder,
                "samples_dir": self.root / "samples",
                **w.evaluate,
                **({"relearn_max_steps": 0, "inversion_steps": [100]} if trial else {}),
            },
            f"reports/{name}-s{seed}",
        )
        seconds = w.seconds["unlearn"] * steps + w.seconds["evaluate"]
        after = [
            self._name(n)
            for n in ("base", "judge", "judge who knows noise", f"sets, {self.regime} replay")
        ]
        return Run(self._name(f"{name}, seed {seed}"), (made, judged), seconds, steps, tuple(after))

    def _name(self, what: str) -> str:
        return f"{self.world.name}: {what}"


def losses(loss: str, method: str) -> Options:
    """The losses as options of unlearning.

    Retrain always has replay, as it learns nothing from the base. A method with its own forget
    loss, or with none, keeps that."""
    if method == "retrain":
        loss = "replay"
    if loss == "relabel" and methods[method].forgets not in ("surrogate", "relabel"):
        loss = "crossed"
    return LOSSES[loss]
