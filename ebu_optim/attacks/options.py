"""The options of an attack."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..errors import InputError
from ..text_to_image.pipelines import Model
from ..text_to_image.results import named_base
from ..training.fields import option
from .attacks import USUAL
from .judges import JudgeOptions
from .prompts import QuestionOptions

#: Defaults that depend on the size of the model: (in the world of digits, elsewhere).
SMALL = {
    "num_inference_steps": (10, 50),
    "guidance_scale": (3.0, None),
    "sample_batch_size": (64, 4),
    "train_batch_size": (16, 4),
    "relearn_learning_rate": (1e-4, 1e-5),
    "inversion_learning_rates": ([3e-3], [5e-3]),
    "lora_learning_rate": (1e-3, 1e-4),
}
Attack = Literal[
    "paraphrase", "inversion", "relearn", "cce", "unlearndiffatk", "tina", "lora_relearn"
]


@dataclass(frozen=True, kw_only=True)
class AttackOptions(JudgeOptions, QuestionOptions, Model):
    """The model to attack, and the settings of the attacks.

    Raises:
        InputError: a value is out of range.
    """

    group: ClassVar[str] = "strength of the attacks"
    titles: ClassVar[dict[str, tuple[str, ...]]] = {
        "attack": (
            "pretrained_model_name_or_path",
            "base_model",
            "forget",
            "judge",
            "attacks",
            "output_dir",
            "overwrite",
            "seed",
            "device",
        ),
        "judge": ("nudity_labels", "nudity_threshold", "nudity_colours"),
    }

    base_model: str | None = option(
        None,
        help="The model before it forgot. Default: the one that the unlearn.json beside the model "
        "names.",
    )
    attacks: list[Attack] = option(list(USUAL), help="Which attacks to run.")
    instance_data_dir: Path | None = option(
        None,
        help="Folder of images of the target to learn from. Default: the base model generates "
        "them.",
    )
    target_images: int = option(64, help="Number of images of the target that the base generates.")
    target_dir: Path | None = option(
        None,
        help="Folder in which these images are kept; attacks on models with the same base can "
        "share it. Default: target in the output folder.",
    )
    attack_images: int = option(
        32, help="Images that are generated and judged after each attack, and for each wording."
    )
    inversion_steps: int = option(200, help="Steps of textual inversion.")
    inversion_learning_rates: list[float] | None = option(
        None,
        help="Learning rates of textual inversion. Each gives a separate run, and the strongest "
        "counts. Default: 3e-3 in the world, 5e-3 elsewhere.",
    )
    initializer_token: list[str] = option(
        [],
        help="Words from whose embeddings textual inversion also starts, each in a separate run, "
        "in addition to a random start: another word of the concept, or a neighbour.",
    )
    relearn_max_steps: int = option(50, help="Maximal number of steps of relearning.")
    relearn_learning_rate: float | None = option(
        None, help="Learning rate of relearning. Default: 1e-4 in the world, 1e-5 elsewhere."
    )
    cce_steps: int = option(1000, help="Steps of the attack cce; 5000 were published.")
    unlearndiffatk_timesteps: int = option(
        50,
        help="Timesteps of a search of unlearndiffatk. With fewer than 50 the attack is not the "
        "published one.",
    )
    unlearndiffatk_iterations: int = option(
        40, help="Iterations of unlearndiffatk at each timestep."
    )
    tina_steps: int = option(50, help="DDIM steps of tina in each direction.")
    tina_refinements: int = option(
        25, help="Refinements of each DDIM step of tina in the direction of the noise."
    )
    lora_learning_rate: float | None = option(
        None, help="Learning rate of lora_relearn. Default: 1e-3 in the world, 1e-4 elsewhere."
    )
    train_batch_size: int | None = option(
        None, help="Batch size of inversion and relearning. Default: 16 in the world, 4 elsewhere."
    )
    num_inference_steps: int | None = option(
        None, help="DDIM steps of each image. Default: 10 in the world, 50 elsewhere."
    )
    guidance_scale: float | None = option(
        None,
        help="Guidance scale of each image. Default: 3 in the world, elsewhere that of the "
        "model's family.",
    )
    sample_batch_size: int | None = option(
        None, help="Images that are generated at once. Default: 64 in the world, 4 elsewhere."
    )
    seed: int = option(0, help="Seed of the images and of the attacks.")
    device: str = option(
        "cuda" if torch.cuda.is_available() else "cpu",
        help="Device on which the attacks run: cpu, cuda, cuda:1, ...",
    )
    output_dir: Path = option(help="Folder for attacks.json and the other results.")
    overwrite: bool = option(False, help="Replace the results of an earlier run in this folder.")

    def resolved(self) -> AttackOptions:
        """A copy with the defaults that depend on other options.

        Raises:
            InputError: the base is not given, and no unlearn.json names it.
        """
        base = self.base_model or named_base(self.pretrained_model_name_or_path)
        own: dict[str, Any] = {"base_model": base, "target_dir": self.output_dir / "target"}
        for name, (world, elsewhere) in SMALL.items():
            own[name] = world if self.judge == "world" else elsewhere
        return replace(self, **{k: v for k, v in own.items() if getattr(self, k) is None})

    def __post_init__(self) -> None:
        for name in (
            "target_images",
            "attack_images",
            "inversion_steps",
            "relearn_max_steps",
            "train_batch_size",
            "num_inference_steps",
            "sample_batch_size",
            "cce_steps",
            "unlearndiffatk_timesteps",
            "unlearndiffatk_iterations",
            "tina_steps",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name} must be >= 1; got {value}")
        if self.tina_refinements < 0:
            raise InputError(f"--tina_refinements must be >= 0; got {self.tina_refinements}")
        for name in ("relearn_learning_rate", "inversion_learning_rates", "lora_learning_rate"):
            value = getattr(self, name)
            if value is not None and not min(value if isinstance(value, list) else [value]) > 0:
                raise InputError(f"--{name} must be > 0; got {value}")
