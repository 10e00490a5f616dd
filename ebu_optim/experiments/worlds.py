"""The worlds of the experiments: data, base model, judges, replay, and how a method is measured.

small       real 8x8 digits; two CPU cores
cifar16     real CIFAR-10 images, five classes at 16x16; a CPU and some hours
cifar10-16  real CIFAR-10 images, all ten classes at 16x16; a CPU and some hours
paper       CIFAR-10, CIFAR-100 or STL-10 as the paper has them; GPUs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .runs import Options


class World(NamedTuple):
    """The options of a world, by task.

    Attributes:
        images: which images of the source are used.
        seconds: the times of a step of the base and of the classifier, of the sets, of a step of
            unlearning, and of an evaluation: measured on one core of an x86-64 CPU, or, for the
            paper's worlds, guessed for one H100.
    """

    name: str
    title: str
    source: Options
    images: Options
    base: Options
    judge: Options
    sets: Options
    unlearn: Options
    evaluate: Options
    seconds: Mapping[str, float]
    forget: str = "0"
    partial: Sequence[str] = ("1", "2", "3")
    basis: str = "one core of a 2.5 GHz x86-64 CPU a run"
    paper: str | None = "table6_cifar10_ddpm_class0"  # its table in paper_tables.json
    smoke: str | None = None  # for a smoke run, why its figures mean nothing
    generated: Options | None = None  # options of worlds.shapes, for generated images
    classes: Sequence[str] = ()  # their names; empty: not known before the images are read


def _seconds(*each: float) -> dict[str, float]:
    names = "train", "train_classifier", "prepare", "unlearn", "evaluate"
    return dict(zip(names, each, strict=True))


DIGITS = World(
    "digits",
    "8x8 digits",
    {"digits": True},
    {},
    base={
        "model": "small",
        "use_ema": True,
        "ema_decay": 0.995,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "train_batch_size": 64,
        "max_train_steps": 2000,
    },
    judge={"model": "small", "train_batch_size": 64, "max_train_steps": 800},
    sets={
        "weights": "ema",
        "replay_per_class": 50,
        "num_inference_steps": 20,
        "guidance_scale": 1.0,
        "fisher_images": 300,
    },
    unlearn={
        "start_from": "ema",
        "train_batch_size": 16,
        "validation_images": 20,
        "validation_inference_steps": 10,
        "logging_steps": 50,
    },
    evaluate={"images_per_class": 50, "num_inference_steps": 20, "sample_batch_size": 250},
    seconds=_seconds(0.066, 0.014, 18.0, 0.09, 18.0),
    classes=tuple("0123456789"),
)

CIFAR16 = World(
    "cifar16",
    "CIFAR-10, five classes at 16x16",
    {"dataset_name": "uoft-cs/cifar10"},
    {"classes": ["airplane", "automobile", "frog", "horse", "ship"], "resolution": 16},
    base={
        "model": "small",
        "use_ema": True,
        "ema_decay": 0.999,
        "random_flip": True,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 200,
        "train_batch_size": 64,
        "max_train_steps": 18000,
        "checkpointing_steps": 1000,
    },
    judge={
        "model": "small",
        "random_flip": True,
        "train_batch_size": 128,
        "num_train_epochs": 8,
        "lr_scheduler": "cosine",
    },
    sets={
        "weights": "ema",
        "replay_per_class": 100,
        "num_inference_steps": 20,
        "guidance_scale": 1.0,
        "fisher_images": 200,
        "fisher_timesteps": 4,
    },
    unlearn={
        "start_from": "ema",
        "train_batch_size": 16,
        "validation_images": 20,
        "validation_inference_steps": 10,
        "validation_steps": 50,
        "logging_steps": 50,
    },
    evaluate={"images_per_class": 100, "num_inference_steps": 20, "sample_batch_size": 250},
    seconds=_seconds(0.17, 0.06, 100.0, 0.25, 110.0),
    forget="airplane",
    partial=("automobile", "frog"),
    classes=("airplane", "automobile", "frog", "horse", "ship"),
)

CIFAR10_16 = CIFAR16._replace(
    name="cifar10-16",
    title="CIFAR-10 at 16x16",
    images={"resolution": 16},
    base={**CIFAR16.base, "max_train_steps": 15000, "mixed_precision": "bf16"},
    judge={
        **CIFAR16.judge,
        "model": "medium",
        "mixed_precision": "bf16",
        "num_train_epochs": 12,
    },
    sets={**CIFAR16.sets, "guidance_scale": 3.0},
    evaluate={**CIFAR16.evaluate, "guidance_scale": 3.0},
    seconds=_seconds(0.25, 0.1, 200.0, 0.3, 220.0),
    partial=("automobile", "bird", "frog", "truck"),
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)


def _paper(name: str, title: str, source: str, images: Options, steps: int, table: str) -> World:
    return World(
        name,
        title,
        {"dataset_name": source},
        images,
        base={
            "model": "paper",
            "use_ema": True,
            "random_flip": True,
            "max_train_steps": steps,
            "checkpointing_steps": 5000,
            "mixed_precision": "bf16",
        },
        judge={"model": "resnet34", "random_flip": True},
        sets={"weights": "ema", "replay_per_class": 500, "num_inference_steps": 50},
        unlearn={"start_from": "ema", "train_batch_size": 128, "validation_images": 20},
        evaluate={
            "images_per_class": 500,
            "num_inference_steps": 50,
            "guidance_scale": 3.0,
            "fid": True,
        },
        seconds=_seconds(0.12, 0.1, 900.0, 0.4, 900.0),
        paper=table,
        basis="a guess for one H100, never measured",
    )


CIFAR10 = _paper(
    "cifar10", "CIFAR-10", "uoft-cs/cifar10", {}, 800_000, "table6_cifar10_ddpm_class0"
)
CIFAR100 = _paper(
    "cifar100",
    "CIFAR-100",
    "uoft-cs/cifar100",
    {"label_column": "fine_label"},
    800_000,
    "table1_cifar100_ddpm_class0",
)
STL10 = _paper(
    "stl10",
    "STL-10",
    "tanganke/stl10",
    {"resolution": 64, "join_splits": True},
    250_000,
    "table1_and_6_stl10_ddpm_class0",
)

STL10_SMOKE = World(
    "stl10-smoke",
    "generated shapes in place of STL-10, a smoke run",
    {},
    {"resolution": 16, "join_splits": True},
    base={
        "model": "small",
        "use_ema": True,
        "ema_decay": 0.98,
        "learning_rate": 2e-3,
        "train_batch_size": 16,
        "max_train_steps": 200,
    },
    judge={"model": "small", "train_batch_size": 32, "max_train_steps": 60},
    sets={
        "weights": "ema",
        "replay_per_class": 8,
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "fisher_images": 40,
        "fisher_timesteps": 2,
    },
    unlearn={
        "start_from": "ema",
        "train_batch_size": 8,
        "validation_images": 4,
        "validation_inference_steps": 10,
        "logging_steps": 50,
    },
    evaluate={
        "images_per_class": 8,
        "num_inference_steps": 10,
        "attack_images": 16,
        "inversion_steps": [100],
        "relearn_max_steps": 50,
        "sample_batch_size": 250,
    },
    seconds=_seconds(0.08, 0.03, 5.0, 0.12, 21.0),
    paper="table1_and_6_stl10_ddpm_class0",
    smoke="A smoke run: every part runs, on generated images of coloured shapes at 16x16, not on "
    "STL-10, and far too few of them and too short. Its figures mean nothing.",
    generated={"per_class": 40},
)

CIFAR100_SMALL = World(
    "cifar100-small",
    "CIFAR-100 at 16x16, a short run",
    {"dataset_name": "uoft-cs/cifar100"},
    {"label_column": "fine_label", "resolution": 16},
    base={
        "model": "small",
        "use_ema": True,
        "ema_decay": 0.99,
        "random_flip": True,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "train_batch_size": 64,
        "max_train_steps": 400,
    },
    judge={"model": "small", "random_flip": True, "train_batch_size": 128, "max_train_steps": 300},
    sets={
        "weights": "ema",
        "replay_per_class": 3,
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
        "fisher_images": 100,
        "fisher_timesteps": 2,
    },
    unlearn={
        "start_from": "ema",
        "train_batch_size": 4,
        "validation_images": 1,
        "validation_inference_steps": 5,
        "logging_steps": 50,
    },
    evaluate={
        "images_per_class": 5,
        "num_inference_steps": 10,
        "attack_images": 20,
        "inversion_steps": [100],
        "relearn_max_steps": 20,
        "sample_batch_size": 250,
    },
    seconds=_seconds(0.22, 0.06, 12.0, 0.1, 24.0),
    paper="table1_cifar100_ddpm_class0",
    smoke="A short run on real images at 16x16: 400 steps of a small base model, whose samples the "
    "classifier hardly knows (RA of the base model), and 5 images a class. It shows that "
    "everything runs with 100 classes, and far too little to compare methods.",
)
