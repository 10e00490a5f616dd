"""The options of unlearn.py for text-to-image models, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..baselines import recipes
from ..diffusion.objectives import REMEMBER_LOSS, LossOptions
from ..errors import InputError
from ..training import adversary
from ..training.adversary import AdversaryOptions
from ..training.fields import as_dict, check_choices, option
from ..training.method import MethodOptions, guided_steps
from ..training.options import TrainingOptions
from ..training.relearner import RelearnerOptions
from . import edits
from .hub import HubOptions
from .modules import ModuleOptions, is_adapter
from .pipelines import Model
from .prompts import PromptOptions
from .save import ADAPTERS, SaveOptions
from .sets import SetOptions
from .validation import ValidationOptions
from .warm_start import WarmStartOptions

#: --method: short names, and the methods of the table that work for text-to-image models.
ALIASES = {"ebu": "ebu_added", "sa": "selective_amnesia"}
METHODS = (*ALIASES, *(m for m in recipes if m not in ("retrain", "embedding_only")))


@dataclass(frozen=True, kw_only=True)
class Unlearn(
    TrainingOptions,
    HubOptions,
    SaveOptions,
    ValidationOptions,
    SetOptions,
    RelearnerOptions,
    AdversaryOptions,
    LossOptions,
    ModuleOptions,
    WarmStartOptions,
    MethodOptions,
    PromptOptions,
    Model,
):
    """All options of a run.

    Raises:
        InputError: a value is out of range, or two options exclude each other.
    """

    method: Literal[METHODS] = option(  # type: ignore[valid-type]
        "ebu",
        help='Method of unlearning; "ebu" is ebu_added. uce, rece and speed are edits in closed '
        "form, without a training step.",
    )
    fisher: Literal["online", "estimate", "none"] | None = option(
        None, help="Source of F. Default: online; for SA: estimate."
    )
    remember: Literal["replay", "distill", "crossed"] = option(
        "replay", flag="--remember_loss", help=REMEMBER_LOSS
    )
    reduction: Literal["sum", "mean"] = option("mean", help="Reduction of the losses over C, H, W.")
    train_batch_size: int = option(1, help="Batch size of each process.")
    learning_rate: float | None = option(
        None, help="Learning rate. Default: the method's published one."
    )  # type: ignore[assignment]
    max_grad_norm: float | None = option(  # type: ignore[assignment]
        None,
        help="Clip the combined gradient to this norm; 0 does not clip. Default: 1 for "
        "the methods whose published code clips, else 0.",
    )

    def resolved(self) -> Unlearn:
        """A copy with the defaults that depend on other options; `self` if none is missing."""
        method = ALIASES.get(self.method, self.method)
        recipe = recipes[method]
        adapter = recipe.adapter or self.train_modules == "lora"
        one_file = Path(self.pretrained_model_name_or_path).is_file()
        own: dict[str, Any] = {
            "learning_rate": recipe.learning_rate,
            "max_grad_norm": 1.0 if recipe.clips else 0.0,
            "guided_steps": guided_steps(method),
            "train_modules": None if recipe.adapter else "xattn",
            "sets_dir": self.output_dir / "sets",
            "save_as": "lora" if adapter else "single" if one_file else "pipeline",
            "hub_model_id": self.output_dir.resolve().name if self.push_to_hub else None,
        }
        if recipe.edits:  # no step is taken, so there is nothing that these could be of
            own = {k: own[k] for k in ("sets_dir", "save_as", "hub_model_id")}
        found = {k: v for k, v in own.items() if getattr(self, k) is None and v is not None}
        if recipe.edits:
            none = {"max_train_steps": 0, "validation_steps": 0}
            found |= {k: v for k, v in none.items() if getattr(self, k) != v}
        found |= adversary.defaults(self, method)
        if method != self.method:
            found["method"] = method
        ours = recipe.published
        if isinstance(self.method_options, dict) and not ours.keys() <= self.method_options.keys():
            found["method_options"] = {**ours, **self.method_options}
        return replace(self, **found) if found else self

    def __post_init__(self) -> None:
        check_choices(type(self), as_dict(self))
        if self.resolved() is not self:
            return  # the resolved copy runs these checks
        closed_form = bool(recipes[self.method].edits)
        self.check_training(steps=0 if closed_form else 1)
        self.check_method()
        if closed_form:
            edits.check(self)
        if recipes[self.method].adapter and self.train_modules is not None:
            raise InputError(
                f"--train_modules {self.train_modules}: SPM trains its own adapters; leave the "
                "option out"
            )
        self.check_modules()
        self.check_losses()
        self.check_adversary()
        self.check_relearner()
        if self.adversary_prompts and not adversary.attacked(self):
            raise InputError("--adversary_prompts needs --adversary_steps; give a number >= 1")
        self.check_sets()
        self.check_validation()
        if self.save_as in ADAPTERS and not is_adapter(self):
            raise InputError(
                f"--save_as {self.save_as}: --train_modules {self.train_modules} changes the "
                "weights themselves; train with --train_modules lora, or give --save_as "
                "changed, which saves only the changed tensors"
            )
        self.check_hub()
