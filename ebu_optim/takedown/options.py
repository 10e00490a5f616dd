"""The options of `ebu forget`: those of unlearning, under the names that a request has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..attacks.judges import JudgeOptions
from ..baselines import methods
from ..diffusion.objectives import REMEMBER_LOSS
from ..errors import InputError
from ..text_to_image.options import ALIASES, Unlearn
from ..text_to_image.prompts import PLACE, REMEMBER
from ..training.fields import at_least, option

#: --preset: what it gives to options that are not given. The recommended one is what
#: docs/text_to_image_results.md recommends, the paper's is `Unlearn`'s own defaults.
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
    """What a request says."""

    group: ClassVar[str] = "request"

    preset: Literal["recommended", "paper"] = option(
        "recommended",
        help="recommended: --train_modules full --forget_loss relabel --remember_loss "
        "crossed --gamma 1000 and three templates; paper: --train_modules xattn and the "
        "method's own losses. An option that you give yourself has precedence.",
    )
    plan: bool = option(
        False,
        help="Print what would be done, what it costs and what would be written, and do nothing.",
    )
    evidence_images: int = option(
        4, help="Pictures of each prompt in the report, before and after; 0 leaves them out."
    )
    evidence_prompts: int = option(
        8, help="The report shows at most so many of the prompts to keep, and as many others."
    )
    attacks: list[Literal["paraphrase", "inversion", "relearn"]] = option(
        ["inversion", "relearn"], nargs="*", help="Attacks in the report, which need a --judge."
    )
    paraphrases: list[str] = option(
        [], help="Prompts in other words, or files of them, for the attack of that name."
    )
    attack_images: int = option(16, help="Pictures on which each attack is judged.")
    clip_weights: str = option(
        "openai",
        help='Weights of the CLIP score: a tag of open_clip, a file, or "none" for no score.',
    )
    sign_key: Path | None = option(
        None, help="Sign the evidence with this private key (PEM, elliptic curve)."
    )
    sign_certificate: list[Path] = option(
        [], help="Certificate that belongs to --sign_key, then those up to the root."
    )


@dataclass(frozen=True, kw_only=True)
class Forget(RequestOptions, JudgeOptions, Unlearn):
    """A request: which model, without what.

    Raises:
        InputError: numbers and options that cannot be, or not together.
    """

    #: What the help has first: a request and the machine, before what a newcomer leaves alone.
    titles: ClassVar[dict[str, tuple[str, ...]]] = {
        "request": (
            "surrogate_concept",
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
        help="What the model shall forget, each in a word or a few; or .txt files with one a line.",
    )
    surrogate_concept: list[str] = option(
        [],
        flag="--as",
        metavar="OTHER",
        help="What each concept becomes, in the words around it. Default: what the empty "
        "prompt draws.",
    )
    remember_prompts: list[str] = option(
        [str(REMEMBER)],
        flag="--keep",
        metavar="PROMPT",
        help="Prompts that must stay, above all those near the concept; or .txt files with "
        f"one a line. Default: {REMEMBER.name}, which ships with the package.",
    )
    output_dir: Path = option(
        flag=("-o", "--output_dir"),
        metavar="FOLDER",
        help="Folder for the result and its evidence.",
    )
    judge: Literal["clip", "world", "imagenette", "nudity"] | None = option(  # type: ignore[assignment]
        None, help="Who says what a picture shows. Default: nobody, and the report has no attacks."
    )
    forget_templates: list[str] | None = option(  # type: ignore[assignment]
        None,
        help=f'Sentences with "{PLACE}" for the concept, or files of them. Default: the preset\'s.',
    )
    remember: Literal["replay", "distill", "crossed"] | None = option(  # type: ignore[assignment]
        None,
        flag="--remember_loss",
        help=f"{REMEMBER_LOSS} Default: the preset's.",
    )

    def resolved(self) -> Forget:
        """With the preset's values, and the defaults that depend on other options."""
        given = {k: v for k, v in self._preset().items() if getattr(self, k) is None}
        whole = replace(self, **given) if given else self
        return super(Forget, whole).resolved()  # type: ignore[return-value]

    def _preset(self) -> dict[str, Any]:
        """Without what the method has of its own."""
        recipe = methods[ALIASES.get(self.method, self.method)]
        given = dict(PRESETS[self.preset])
        if recipe.forgets not in ("surrogate", "relabel"):
            given = {k: v for k, v in given.items() if k not in ("forget_loss", "train_modules")}
        if "gamma" not in recipe.options:
            given.pop("gamma", None)
        if recipe.forgets is None or recipe.stalls or not recipe.replayed:
            # distillation has a gradient of zero, which is all, or stalls; else it has no effect
            given["remember"] = "replay"
        return given

    def __post_init__(self) -> None:
        if self.resolved() is not self:
            return  # that one is checked
        if not self.forget:
            raise InputError("CONCEPT: name what is to be forgotten")
        super().__post_init__()
        at_least(self, 0, "evidence_images", "evidence_prompts")
        for name in ("sign_key", "sign_certificate"):
            given = getattr(self, name)
            for path in given if isinstance(given, list) else [given]:
                if path is not None and not path.is_file():
                    raise InputError(f"--{name} {path}: there is no such file")
        if self.sign_certificate and self.sign_key is None:
            raise InputError("--sign_certificate needs --sign_key, the key of the first of them")
        if "paraphrase" in self.attacks and not self.paraphrases:
            raise InputError("--attacks paraphrase needs --paraphrases, the prompts in other words")
