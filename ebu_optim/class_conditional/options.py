"""The options of training a class-conditional model, a classifier of its images, and unlearning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..baselines import closed_forms, methods
from ..diffusion.objectives import LossOptions
from ..errors import InputError
from ..training import adversary
from ..training.adversary import AdversaryOptions
from ..training.fields import as_dict, at_least, check_choices, option
from ..training.method import MethodOptions, guided_steps
from ..training.options import TrainingOptions
from ..training.relearner import RelearnerOptions
from ..training.sources import DataOptions
from .models import Weights

#: The values of --method. SPM is left out, because its adapter needs transformer blocks.
METHODS = ("ebu", *(m for m in methods if not methods[m].adapter))


@dataclass(frozen=True, kw_only=True)
class Train(DataOptions, TrainingOptions):
    """Options for training the model that later forgets.

    Raises:
        InputError: a number is out of range.
    """

    model: Literal["paper", "small"] = option(
        "paper", help="Size of the network: the paper's, or a small one."
    )
    cond_dropout: float = option(
        0.1, help="Probability with which a label is replaced by the null class, for guidance."
    )
    reduction: Literal["sum", "mean"] = option("sum", help="Reduction of the loss over C, H, W.")
    random_flip: bool = option(False, help="Mirror half of the images.")
    use_ema: bool = option(False, help="Also save an average of the weights, as unet_ema.")
    ema_decay: float = option(0.9999, help="Decay of this average.")
    learning_rate: float = option(2e-4, help="Learning rate. Default: it depends on the model.")

    def __post_init__(self) -> None:
        self.check_training()
        _check_share(self.cond_dropout, "cond_dropout")
        _check_share(self.ema_decay, "ema_decay")


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(DataOptions, TrainingOptions):
    """Options for training the classifier that judges generated images.

    Raises:
        InputError: a number is out of range.
    """

    model: Literal["resnet34", "medium", "small"] = option(
        "resnet34", help="Size of the network: the paper's, or smaller ones."
    )
    pretrained_weights: str = option(
        "imagenet",
        help='Where a resnet34 begins: "imagenet" (a download of 83 MB), the file of a '
        'state dict, or "none".',
    )
    reject: bool = option(False, help="Add a reject class, which means noise.")
    num_train_epochs: int = option(10, help="Epochs to train, unless --max_train_steps is given.")
    random_flip: bool = option(False, help="Mirror half of the images.")
    weight_decay: float | None = option(
        None, help="Weight decay. Default: 5e-4 for resnet34, else 1e-2."
    )
    learning_rate: float | None = option(
        None, help="Learning rate. Default: it depends on the model."
    )  # type: ignore[assignment]
    max_train_steps: int | None = option(None, help="Steps of the optimizer.")  # type: ignore[assignment]

    def resolved(self, images: int) -> TrainClassifier:
        """Return the options with the protocol's numbers, and steps for this number of images."""
        per_epoch = max(images // self.train_batch_size, 1)
        own: dict[str, Any] = {
            "learning_rate": 1e-5 if self.model == "resnet34" else 2e-3,
            "weight_decay": 5e-4 if self.model == "resnet34" else 1e-2,
            "max_train_steps": self.num_train_epochs * per_epoch,
        }
        return replace(self, **{k: v for k, v in own.items() if getattr(self, k) is None})

    def __post_init__(self) -> None:
        self.check_training()


@dataclass(frozen=True, kw_only=True)
class Unlearn(
    MethodOptions, RelearnerOptions, AdversaryOptions, LossOptions, DataOptions, TrainingOptions
):
    """Of a run that makes a model forget classes.

    Raises:
        InputError: an option is out of range, or options do not go together.
    """

    pretrained_model_name_or_path: str = option(help="Folder that train.py made.")
    prepared_dir: Path = option(help="Folder that prepare.py made.")
    forget: list[str] | None = option(
        None, help="Classes to forget, by number or name. Default: those that were prepared."
    )
    replay_classes: list[str] | None = option(
        None, help="Classes to replay, by number or name. Default: those that were prepared."
    )
    surrogate: Literal["uniform", "gaussian", "analytic", "null_class"] = option(
        "uniform",
        help="What replaces the class: uniform or Gaussian noise, Gaussian noise "
        "in closed form, or images of the null class.",
    )
    remember_data: Literal["replay", "real"] | None = option(
        None, help="Images for the remember loss. Default: real for retrain, else the replay set."
    )
    start_from: Weights = option("trained", help="The weights that are trained and anchored.")
    use_ema: bool = option(False, help="Also save an average of the weights, as unet_ema.")
    ema_decay: float = option(0.9999, help="Decay of this average.")
    sample_weights: Weights = option("trained", help="The weights that the curve measures.")
    classifier: Path | None = option(
        None, help="Classifier for the curve: P_f and accuracy every --validation_steps."
    )
    entropy_classifier: Path | None = option(
        None,
        help="Classifier for CE_f and CE_r of the curve. It is needed if --classifier has a "
        "reject class, because then noise has no entropy. Default: --classifier.",
    )
    validation_steps: int = option(25, help="Measure the curve every so many steps.")
    validation_images: int = option(20, help="Images of each class for the curve.")
    validation_inference_steps: int = option(20, help="DDIM steps of each of these images.")
    validation_pictures: int = option(
        0, help="How many of these images, per class, are saved in pictures.safetensors."
    )
    method: Literal[METHODS] = option(  # type: ignore[valid-type]
        "ebu",
        help='Method of unlearning; "ebu" is ebu_added.',
        elsewhere=dict.fromkeys(
            closed_forms,
            "it edits how cross attention reads text embeddings, and a class-conditional model has "
            "neither",
        ),
    )
    fisher: Literal["online", "prepared", "none"] | None = option(
        None, help="Where F comes from. Default: online; for SA what prepare.py estimated."
    )
    max_train_steps: int = option(200, help="Steps of the optimizer.")
    checkpointing_steps: int = option(100, help="Save a checkpoint every so many steps.")

    def resolved(self) -> Unlearn:
        """Return the options with all defaults filled in; `self` if nothing is missing."""
        method = "ebu_added" if self.method == "ebu" else self.method
        found: dict[str, Any] = {} if method == self.method else {"method": method}
        if self.guided_steps is None:
            found["guided_steps"] = guided_steps(method)
        found |= adversary.defaults(self, method)
        if self.remember_data is None:
            found["remember_data"] = "real" if methods[method].fresh else "replay"
        return replace(self, **found) if found else self

    def __post_init__(self) -> None:
        check_choices(type(self), as_dict(self))
        if self.resolved() is not self:
            return  # __post_init__ of the resolved options checks the rest
        self.check_training()
        self.check_method()
        _check_share(self.ema_decay, "ema_decay")
        at_least(self, 1, "validation_steps", "validation_images", "validation_inference_steps")
        if not 0 <= self.validation_pictures <= self.validation_images:
            raise InputError(
                f"--validation_pictures must be 0 to --validation_images "
                f"({self.validation_images}), because they are taken from these; got "
                f"{self.validation_pictures}"
            )
        if self.entropy_classifier and not self.classifier:
            raise InputError("--entropy_classifier needs --classifier, which measures P_f and RA")
        self.check_losses()
        self.check_adversary()
        self.check_relearner()
        if self.sample_weights == "ema" and not self.use_ema:
            raise InputError("--sample_weights ema needs --use_ema")


def _check_share(value: float, name: str) -> None:
    if not 0 <= value < 1:
        raise InputError(f"--{name} must be in [0, 1); got {value}")
