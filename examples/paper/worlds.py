"""The settings of the experiments: data, base model, judges, and how a method is run in them.

small     real 8x8 digits; two CPU cores
cifar16   real CIFAR-10 images, five classes at 16x16; a CPU and some hours
paper     CIFAR-10, CIFAR-100 or STL-10 as the paper has them; GPUs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runs import Command, Run, command

from ebu_optim.baselines import methods

#: What is remembered by, and for the last also forgotten by, as options of unlearn.py.
LOSSES: dict[str, tuple[Any, ...]] = {
    "replay": ("--remember", "replay"),
    "distill": ("--remember", "distill"),
    "crossed": ("--remember", "crossed"),
    "relabel": ("--remember", "crossed", "--forget_loss", "relabel"),
}
JUDGED = ("--sample_batch_size", 250)


class World(NamedTuple):
    """`seconds`: of a step of the base, of the classifier, of unlearning, and of an evaluation with
    and without the relearning attack: measured on one core of an x86-64 CPU, or, for the paper's,
    a guess for one H100."""

    name: str
    title: str
    source: tuple[str, ...]
    images: tuple[Any, ...]
    base: tuple[Any, ...]
    judge: tuple[Any, ...]
    sets: tuple[Any, ...]
    unlearn: tuple[Any, ...]
    evaluate: tuple[Any, ...]
    seconds: Mapping[str, float]
    forget: str
    partial: tuple[str, ...]
    basis: str
    paper: str | None = None  # its table in paper_tables.json
    smoke: str | None = None  # why its figures mean nothing, where they do not
    generated: tuple[Any, ...] = ()  # options of shapes.py, whose images are taken


DIGITS = World(
    "digits", "8x8 digits", ("--digits",), (),
    ("--model", "small", "--use_ema", "--ema_decay", 0.995, "--learning_rate", 2e-3,
     "--lr_scheduler", "cosine", "--lr_warmup_steps", 50, "--train_batch_size", 64,
     "--max_train_steps", 2000),
    ("--model", "small", "--train_batch_size", 64, "--max_train_steps", 800),
    ("--weights", "ema", "--replay_per_class", 50, "--num_inference_steps", 20,
     "--guidance_scale", 1, "--fisher_images", 300),
    ("--start_from", "ema", "--train_batch_size", 16, "--validation_images", 20,
     "--validation_inference_steps", 10, "--logging_steps", 50),
    ("--images_per_class", 50, "--num_inference_steps", 20, *JUDGED),
    {"train": 0.066, "train_classifier": 0.014, "prepare": 18.0, "unlearn": 0.09, "evaluate": 18.0},
    "0", ("1", "2", "3"), "one core of a 2.5 GHz x86-64 CPU a run", "table6_cifar10_ddpm_class0",
)  # fmt: skip

CIFAR16 = World(
    "cifar16", "CIFAR-10, five classes at 16x16",
    ("--dataset_name", "uoft-cs/cifar10"),
    ("--classes", "airplane", "automobile", "frog", "horse", "ship", "--resolution", 16),
    ("--model", "small", "--use_ema", "--ema_decay", 0.999, "--random_flip",
     "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 200,
     "--train_batch_size", 64, "--max_train_steps", 18000, "--checkpointing_steps", 1000),
    ("--model", "small", "--random_flip", "--train_batch_size", 128, "--num_train_epochs", 8,
     "--lr_scheduler", "cosine"),
    ("--weights", "ema", "--replay_per_class", 100, "--num_inference_steps", 20,
     "--guidance_scale", 1, "--fisher_images", 200, "--fisher_timesteps", 4),
    ("--start_from", "ema", "--train_batch_size", 16, "--validation_images", 20,
     "--validation_inference_steps", 10, "--validation_steps", 50, "--logging_steps", 50),
    ("--images_per_class", 100, "--num_inference_steps", 20, *JUDGED),
    {"train": 0.17, "train_classifier": 0.06, "prepare": 100.0, "unlearn": 0.25, "evaluate": 110.0},
    "airplane", ("automobile", "frog"), "one core of a 2.5 GHz x86-64 CPU a run",
    "table6_cifar10_ddpm_class0",
)  # fmt: skip


def _paper(
    name: str, title: str, source: str, images: tuple[Any, ...], steps: int, table: str,
    forget: str, partial: tuple[str, ...], *base: Any,
) -> World:  # fmt: skip
    return World(
        name, title, ("--dataset_name", source), images,
        ("--model", "paper", "--use_ema", "--random_flip", "--max_train_steps", steps,
         "--checkpointing_steps", 5000, "--mixed_precision", "bf16", *base),
        ("--model", "resnet34", "--random_flip"),
        ("--weights", "ema", "--replay_per_class", 500, "--num_inference_steps", 50),
        ("--start_from", "ema", "--train_batch_size", 128, "--validation_images", 20),
        ("--images_per_class", 500, "--num_inference_steps", 50, "--guidance_scale", 3, "--fid"),
        {"train": 0.12, "train_classifier": 0.1, "prepare": 900.0, "unlearn": 0.4,
         "evaluate": 900.0},
        forget, partial, "a guess for one H100, never measured", table,
    )  # fmt: skip


CIFAR10 = _paper(
    "cifar10", "CIFAR-10", "uoft-cs/cifar10", (), 800_000,
    "table6_cifar10_ddpm_class0", "0", ("1", "2", "3"),
)  # fmt: skip
CIFAR100 = _paper(
    "cifar100", "CIFAR-100", "uoft-cs/cifar100", ("--label_column", "fine_label"), 800_000,
    "table1_cifar100_ddpm_class0", "0", ("1", "2", "3"),
)  # fmt: skip
STL10 = _paper(
    "stl10", "STL-10", "tanganke/stl10", ("--resolution", 64, "--join_splits"), 250_000,
    "table1_and_6_stl10_ddpm_class0", "0", ("1", "2", "3"),
)  # fmt: skip


STL10_SMOKE = World(
    "stl10-smoke", "generated shapes in place of STL-10, a smoke run", (),
    ("--resolution", 16, "--join_splits"),
    ("--model", "small", "--use_ema", "--ema_decay", 0.98, "--learning_rate", 2e-3,
     "--train_batch_size", 16, "--max_train_steps", 200),
    ("--model", "small", "--train_batch_size", 32, "--max_train_steps", 60),
    ("--weights", "ema", "--replay_per_class", 8, "--num_inference_steps", 10,
     "--guidance_scale", 1, "--fisher_images", 40, "--fisher_timesteps", 2),
    ("--start_from", "ema", "--train_batch_size", 8, "--validation_images", 4,
     "--validation_inference_steps", 10, "--logging_steps", 50),
    ("--images_per_class", 8, "--num_inference_steps", 10, "--attack_images", 16,
     "--inversion_steps", 100, "--relearn_max_steps", 50, *JUDGED),
    {"train": 0.08, "train_classifier": 0.03, "prepare": 5.0, "unlearn": 0.12, "evaluate": 21.0},
    "0", ("1", "2", "3"), "one core of a 2.5 GHz x86-64 CPU a run",
    "table1_and_6_stl10_ddpm_class0",
    smoke="A smoke run: every part runs, on generated images of coloured shapes at 16x16, not on "
    "STL-10, and far too few of them and too short. Its figures mean nothing.",
    generated=("--per_class", 40),
)  # fmt: skip

CIFAR100_SMALL = World(
    "cifar100-small", "CIFAR-100 at 16x16, a short run", ("--dataset_name", "uoft-cs/cifar100"),
    ("--label_column", "fine_label", "--resolution", 16),
    ("--model", "small", "--use_ema", "--ema_decay", 0.99, "--random_flip",
     "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 50,
     "--train_batch_size", 64, "--max_train_steps", 400),
    ("--model", "small", "--random_flip", "--train_batch_size", 128, "--max_train_steps", 300),
    ("--weights", "ema", "--replay_per_class", 3, "--num_inference_steps", 10,
     "--guidance_scale", 1, "--fisher_images", 100, "--fisher_timesteps", 2),
    ("--start_from", "ema", "--train_batch_size", 4, "--validation_images", 1,
     "--validation_inference_steps", 5, "--logging_steps", 50),
    ("--images_per_class", 5, "--num_inference_steps", 10, "--attack_images", 20,
     "--inversion_steps", 100, "--relearn_max_steps", 20, *JUDGED),
    {"train": 0.22, "train_classifier": 0.06, "prepare": 12.0, "unlearn": 0.1, "evaluate": 24.0},
    "0", ("1", "2", "3"), "one core of a 2.5 GHz x86-64 CPU a run", "table1_cifar100_ddpm_class0",
    smoke="A short run on real images at 16x16: 400 steps of a small base model, whose samples the "
    "classifier hardly knows (RA of the base model), and 5 images a class. It shows that "
    "everything runs with 100 classes, and far too little to compare methods.",
)  # fmt: skip


class Setting:
    """A world in a folder, with a regime (which classes are replayed) and a remember loss.

    Args:
        data: options of `DataOptions` that find the same images elsewhere.
    """

    def __init__(self, world: World, root: Path, *, regime: str = "full", loss: str = "replay",
                 data: Sequence[str] = ()) -> None:  # fmt: skip
        self.world, self.root, self.regime, self.loss = world, root / world.name, regime, loss
        self.where = tuple(data) or world.source
        self.tuned_as = [world.name, DIGITS.name]  # the names under which tune.py left strengths
        self.made: Command | None = None
        if world.generated and not data:
            self.made = command("shapes", world.generated, self.root, "images")
        self.base = self._command("train", world.base, "base")
        self.base_key = self.base.folder.name
        self.judge = self._command("train_classifier", world.judge, "judge")
        self.reject = self._command("train_classifier", (*world.judge, "--reject"), "judge-reject")
        model = ("--pretrained_model_name_or_path", self.base.folder)
        replay = ("--replay_classes", *world.partial) if regime == "partial" else ()
        self.sets = self._command(
            "prepare", (*model, "--forget", world.forget, *replay, *world.sets), f"sets-{regime}"
        )

    def _command(
        self, script: str, options: Sequence[Any], name: str, data: bool = True
    ) -> Command:
        extra, where = (self.world.images, self.where) if data else ((), ())
        if data and self.made:  # in the hash: with other images it is another run
            extra = (*extra, "--train_data_dir", self.made.folder)
        return command(script, (*options, *extra), self.root, name, where)

    @property
    def ground(self) -> list[Run]:
        """What every run of a method builds on."""
        w, s = self.world, self.world.seconds
        steps, n = value(w.base, "--max_train_steps"), value(w.judge, "--max_train_steps", 1600)
        per = s["train_classifier"] * n
        made = [Run(self._name("images"), (self.made,), 1.0, 0)] if self.made else []
        after = tuple(r.name for r in made)
        return [
            *made,
            Run(self._name("base"), (self.base,), s["train"] * steps, steps, after),
            Run(self._name("judge"), (self.judge,), per, n, after),
            Run(self._name("judge who knows noise"), (self.reject,), per * 1.5, n, after),
            Run(self._name(f"sets, {self.regime} replay"), (self.sets,), s["prepare"], 0,
                (self._name("base"),)),
        ]  # fmt: skip

    def run(
        self, name: str, method: str, *, seed: int, steps: int = 200, flags: Sequence[Any] = (),
        trial: bool = False,
    ) -> Run:  # fmt: skip
        """A method unlearned and evaluated; `flags` are options of unlearn.py. A `trial` of tuning
        has no curve and is attacked by 100 steps of inversion alone."""
        w = self.world
        unlearn = self._command(
            "unlearn",
            ("--pretrained_model_name_or_path", self.base.folder, "--prepared_dir",
             self.sets.folder, "--method", method, *losses(self.loss, method), "--seed", seed,
             "--max_train_steps", steps, *w.unlearn, *flags,
             *(() if trial else ("--classifier", self.reject.folder))),
            f"models/{name}-s{seed}", data=method == "retrain",
        )  # fmt: skip
        attacks = ("--relearn_max_steps", 0, "--inversion_steps", 100) if trial else ()
        evaluate = self._command(
            "evaluate",
            ("--pretrained_model_name_or_path", unlearn.folder, "--classifier", self.judge.folder,
             "--reject_classifier", self.reject.folder, "--samples_dir", self.root / "samples",
             *w.evaluate, *attacks),
            f"reports/{name}-s{seed}",
        )  # fmt: skip
        seconds = w.seconds["unlearn"] * steps + w.seconds["evaluate"]
        after = [self._name(n) for n in ("base", "judge", "judge who knows noise",
                                         f"sets, {self.regime} replay")]  # fmt: skip
        return Run(
            self._name(f"{name}, seed {seed}"), (unlearn, evaluate), seconds, steps, tuple(after)
        )

    def _name(self, what: str) -> str:
        return f"{self.world.name}: {what}"


def losses(loss: str, method: str, remember: str = "--remember") -> tuple[Any, ...]:
    """Options of unlearn.py. Retrain learns nothing of the base; a method that has a forget loss of
    its own, or none, keeps it.

    Args:
        remember: what the option is called that chooses the remember loss.
    """
    if method == "retrain":
        loss = "replay"
    if loss == "relabel" and methods[method].forgets not in ("surrogate", "relabel"):
        loss = "crossed"
    return tuple(remember if x == "--remember" else x for x in LOSSES[loss])


def value(options: Sequence[Any], name: str, default: Any = 0) -> Any:
    return options[options.index(name) + 1] if name in options else default
