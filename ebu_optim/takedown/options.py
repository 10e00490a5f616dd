"""The options of `ebu forget`: those of unlearning, under names that suit a request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..attacks.judges import JudgeOptions
from ..baselines import recipes
from ..diffusion.objectives import REMEMBER_LOSS
from ..errors import InputError
from ..text_to_image.options import ALIASES, Unlearn
from ..text_to_image.prompts import PLACE, REMEMBER
from ..training.fields import as_dict, at_least, check_choices, option

#: --preset: the values of options that are not given. "recommended" is what
#: docs/text_to_image_results.md recommends, "paper" is the defaults of `Unlearn`.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "train_modules": "full",
        "forget_loss": "relabel",
        "remember": "crossed",
        "gamma": 1000.0,
        "forget_templates": ["an image of {}", "a photo of {}", "{}"],
    },
    "paper": {"remember": "replay", "forget_templates": [PLACE]},
}


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options that describe a request."""

    group: ClassVar[str] = "request"

    preset: Literal["recommended", "paper"] = option(
        "recommended",
        help="recommended: --train_modules full --forget_loss relabel --remember_loss "
        "crossed --gamma 1000 and three templates; paper: --train_modules xattn and the "
        "method's own losses. An option that you give overrides the preset.",
    )
    plan: bool = option(
        False,
        help="Print what the run would do, cost and write, and do nothing.",
    )
    evidence_images: int = option(
        4, help="Images of each prompt in the report, before and after; 0 leaves them out."
    )
    evidence_prompts: int = option(
        8, help="The report shows at most this many prompts to keep, and as many other prompts."
    )
    attacks: list[Literal["paraphrase", "inversion", "relearn"]] = option(
        ["inversion", "relearn"], nargs="*", help="Attacks in the report. They need a --judge."
    )
    paraphrases: list[str] = option(
        [], help="Paraphrased prompts, or files of them, for the paraphrase attack."
    )
    attack_images: int = option(16, help="Images that are generated and judged for each attack.")
    clip_weights: str = option(
        "openai",
        help='Weights of the CLIP score: a tag of open_clip, a file, or "none" for no score.',
    )
    sign_key: Path | None = option(
        None, help="Sign the evidence with this private key (PEM, elliptic curve)."
    )
    sign_certificate: list[Path] = option(
        [], help="Certificate that belongs to --sign_key, then the chain up to the root."
    )


@dataclass(frozen=True, kw_only=True)
class Forget(RequestOptions, JudgeOptions, Unlearn):
    """A request: the model, and the concepts that it shall forget.

    Raises:
        InputError: a value is out of range, or two options exclude each other.
    """

    #: Groups that the help shows first: what a newcomer needs, before the options of training.
    titles: ClassVar[dict[str, tuple[str, ...]]] = {
        "request": (
            "surrogate_concept",
            "surrogate_pairing",
            "remember_prompts",
            "output_dir",
            "plan",
            "save_as",
            "preset",
            "seed",
            "resume_from_checkpoint",
            "overwrite_output_dir",
        ),
        "machine": (
            "cpu",
            "mixed_precision",
            "gradient_checkpointing",
            "sample_batch_size",
        ),
        "report and evidence": (
            "evidence_images",
            "evidence_prompts",
            "clip_weights",
            "sign_key",
            "sign_certificate",
        ),
        "attacks in the report": (
            "judge",
            "attacks",
            "attack_images",
            "paraphrases",
            "nudity_labels",
            "nudity_threshold",
            "nudity_colours",
        ),
    }

    pretrained_model_name_or_path: str = option(
        positional="MODEL", help="The model: a .safetensors file, a diffusers folder or a hub id."
    )
    forget: list[str] = option(
        positional="CONCEPT",
        nargs="*",
        help="Concepts to forget, each in a word or a few; or .txt files with one per line.",
    )
    surrogate_concept: list[str] = option(
        [],
        flag="--as",
        metavar="OTHER",
        help="What each concept becomes, within the same template. Default: what the model "
        "generates for the empty prompt.",
    )
    remember_prompts: list[str] = option(
        [str(REMEMBER)],
        flag="--keep",
        metavar="PROMPT",
        help="Prompts whose images must stay, above all prompts near the concept; or .txt files "
        f"with one per line. Default: {REMEMBER.name}, which ships with the package.",
    )
    output_dir: Path = option(
        flag=("-o", "--output_dir"),
        metavar="FOLDER",
        help="Folder for the result and its evidence.",
    )
    judge: Literal["clip", "world", "imagenette", "nudity"] | None = option(  # type: ignore[assignment]
        None, help="Judge that says what an image shows. Default: none; the report has no attacks."
    )
    forget_templates: list[str] | None = option(  # type: ignore[assignment]
        None,
        help=f'Templates with "{PLACE}" for the concept, or files of them. Default: the preset\'s.',
    )
    remember: Literal["replay", "distill", "crossed"] | None = option(  # type: ignore[assignment]
        None,
        flag="--remember_loss",
        help=f"{REMEMBER_LOSS} Default: the preset's.",
    )

    def resolved(self) -> Forget:
        """A copy with the preset's values and the defaults that depend on other options."""
        given = {k: v for k, v in self._preset().items() if getattr(self, k) is None}
        whole = replace(self, **given) if given else self
        return super(Forget, whole).resolved()  # type: ignore[return-value]

    def _preset(self) -> dict[str, Any]:
        """The preset's values, without those that the method sets itself."""
        recipe = recipes[ALIASES.get(self.method, self.method)]
        given = dict(PRESETS[self.preset])
        if recipe.forgets not in ("surrogate", "relabel"):
            given = {k: v for k, v in given.items() if k not in ("forget_loss", "train_modules")}
        if "gamma" not in recipe.options:
            given.pop("gamma", None)
        if recipe.forgets is None or recipe.stalls or not recipe.replayed:
            # Without another forget gradient, distillation starts with a gradient of zero or
            # stalls; where nothing is replayed, this option has no effect.
            given["remember"] = "replay"
        return given

    def __post_init__(self) -> None:
        check_choices(type(self), as_dict(self))  # first, as the preset depends on them
        if self.resolved() is not self:
            return  # the resolved copy runs these checks
        if not self.forget:
            raise InputError("CONCEPT is missing: name what the model shall forget")
        super().__post_init__()
        at_least(self, 0, "evidence_images", "evidence_prompts")
        for name in ("sign_key", "sign_certificate"):
            given = getattr(self, name)
            for path in given if isinstance(given, list) else [given]:
                if path is not None and not path.is_file():
                    raise InputError(f"--{name} {path}: there is no such file")
        if self.sign_certificate and self.sign_key is None:
            raise InputError("--sign_certificate needs --sign_key, the first certificate's key")
        if "paraphrase" in self.attacks and not self.paraphrases:
            raise InputError("--attacks paraphrase needs --paraphrases, the paraphrased prompts")
