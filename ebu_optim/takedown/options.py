"""The options of `ebu forget`: those of unlearning, under the names that a request has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..attacks.judges import JudgeOptions
from ..baselines import methods
from ..errors import InputError
from ..text_to_image.options import ALIASES, Unlearn
from ..text_to_image.prompts import PLACE, REMEMBER
from ..training.fields import at_least, option

#: --preset: what it gives to options that are not given. The recommended one is what
#: docs/text_to_image_results.md recommends, the paper's is `Unlearn`'s own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "train_modules": "full", "forget_loss": "relabel", "remember": "crossed", "gamma": 1000.0,
        "forget_templates": ["an image of {}", "a photo of {}", "{}"],
    },
    "paper": {"remember": "replay", "forget_templates": [PLACE]},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request says."""

    group: ClassVar[str] = "request"

    preset: Literal["recommended", "paper"] = option(
        "recommended", help="recommended: --train_modules full --forget_loss relabel "
        "--remember_loss crossed --gamma 1000\nand three templates; paper: xattn, the method's own "
        "losses; each where it is not given",
    )  # fmt: skip
    plan: bool = option(
        False, help="say what will be done, what it costs and what is written; do nothing"
    )
    evidence_images: int = option(4, help="of each prompt, before and after; 0: no pictures")
    evidence_prompts: int = option(8, help="at most so many neighbours, and as many others")
    attacks: list[Literal["paraphrase", "inversion", "relearn"]] = option(
        ["inversion", "relearn"], nargs="*", help="of the report, where there is a --judge"
    )
    paraphrases: list[str] = option([], help="prompts in other words, for that attack; files too")
    attack_images: int = option(16, help="that each attack is judged on")
    clip_weights: str = option(
        "openai", help="open_clip's tag or a file, for the CLIP score; or none"
    )
    sign_key: Path | None = option(
        None, help="sign the evidence with this private key (PEM, elliptic curve)"
    )
    sign_certificate: list[Path] = option(
        [], help="of --sign_key: the certificate, then those up to the root's"
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
            "surrogate_concept", "remember_prompts", "output_dir", "plan", "save_as", "preset",
            "seed", "resume_from_checkpoint", "overwrite_output_dir",
        ),
        "machine": (
            "cpu", "mixed_precision", "gradient_checkpointing", "sample_batch_size",
        ),
        "report and evidence": (
            "evidence_images", "evidence_prompts", "clip_weights", "sign_key", "sign_certificate",
        ),
        "attacks in the report": (
            "judge", "attacks", "attack_images", "paraphrases", "nudity_labels",
            "nudity_threshold", "nudity_colours",
        ),
    }  # fmt: skip

    pretrained_model_name_or_path: str = option(
        positional="MODEL", help="a .safetensors file, a diffusers folder or a hub id"
    )
    forget: list[str] = option(
        positional="CONCEPT",
        nargs="*",
        help="what is to be gone, in a word or a few; several, or files (.txt: one a line)",
    )
    surrogate_concept: list[str] = option(
        [],
        flag="--as",
        metavar="OTHER",
        help="what each becomes, in the words around it;\ndefault: what the empty prompt draws",
    )
    remember_prompts: list[str] = option(
        [str(REMEMBER)], flag="--keep", metavar="PROMPT",
        help="what must stay, above all its neighbours: prompts or files of them (.txt: one a "
        f"line);\ndefault: {REMEMBER.name}, which ships with it",
    )  # fmt: skip
    output_dir: Path = option(
        flag=("-o", "--output_dir"), metavar="FOLDER", help="gets the result and its evidence"
    )
    judge: Literal["clip", "world", "imagenette", "nudity"] | None = option(  # type: ignore[assignment]
        None, help="who says what a picture shows; without one the report has no attacks"
    )
    forget_templates: list[str] | None = option(  # type: ignore[assignment]
        None, help=f'sentences with "{PLACE}" for the concept, or files of them'
    )
    remember: Literal["replay", "distill", "crossed"] | None = option(  # type: ignore[assignment]
        None, flag="--remember_loss"
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
