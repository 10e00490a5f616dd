"""The prompts of attack.py: the forgotten prompts, with the place of the concept's word, and their
paraphrases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..errors import InputError
from ..text_to_image.prompt_files import Row, read, rows
from ..text_to_image.prompts import PLACE, check_lengths, check_templates, fill
from ..training.fields import option


class Asked(NamedTuple):
    """A prompt.

    Attributes:
        text: the prompt.
        template: the prompt with `PLACE` instead of the concept's word. Inversion puts its new
            word there.
        seed, guidance: the values of its row in a file; None if there are none.
    """

    text: str
    template: str
    seed: int | None = None
    guidance: float | None = None


class Wording(NamedTuple):
    """Prompts with one paraphrase of the concept."""

    name: str
    texts: list[str]


class Questions(NamedTuple):
    forget: list[Asked]
    paraphrases: list[Wording]


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """The options of the prompts."""

    group: ClassVar[str] = "prompts"

    forget: list[str] = option(
        help="The prompts or concepts that the model was made to forget. With --judge world: words "
        "of one concept."
    )
    ignore_row_settings: bool = option(
        False,
        help="Generate the rows of .csv and .parquet files with --seed and --guidance_scale, not "
        "with their own.",
    )
    forget_templates: list[str] | None = option(
        None,
        help='Templates with "{}" for the concept. Default: "{}"; with --judge world the '
        "world's trained templates, in all styles or digits.",
    )
    paraphrases: list[str] = option(
        [],
        help="Paraphrased prompts, or .txt files of them. With --judge world the concept's "
        "other words and the held-out templates are added.",
    )


def collect(args: Any, tokenizer: Any) -> Questions:
    """Collect and check the prompts that the options name.

    Raises:
        InputError: a word names no concept of the world; there is no paraphrase; a template has no
            place for the concept; a prompt is too long; an --initializer_token is not one token.
    """
    given = rows(args.forget, "--forget")
    if args.ignore_row_settings:
        given = [Row(row.prompt) for row in given]
    words = list(dict.fromkeys(row.prompt for row in given))
    if not all(words):
        raise InputError('--forget "": the empty prompt names no concept; give a concept')
    check_templates(args.forget_templates or [])
    world = args.judge == "world"
    templates = args.forget_templates or ([] if world else [PLACE])
    forget = [Asked(fill(t, r.prompt), t, *r[1:]) for r in given for t in templates]
    paraphrases: list[Wording] = []
    if world:
        forget = forget or of_world(words)
        paraphrases = reworded(words, {one.text for one in forget})
    paraphrases += [Wording(t, [t]) for t in read(args.paraphrases, "--paraphrases")]
    if "paraphrase" in args.attacks and not paraphrases:
        raise InputError(
            "--paraphrases: give paraphrases of the forgotten prompts, or leave the attack out "
            "(--attacks inversion relearn)"
        )
    texts = [one.text for one in forget] + [t for p in paraphrases for t in p.texts]
    check_lengths(texts, tokenizer)
    if "inversion" in args.attacks:
        for token in args.initializer_token:
            one_token(tokenizer, token)
    return Questions(forget, paraphrases)


def concept_of(words: list[str]) -> tuple[str, str]:
    """The concept of the world that all words name: ("content" or "style", its name).

    Raises:
        InputError: a word names no concept, or the words name several.
    """
    from ..worlds.styled_digits.captions import CONTENTS, concept

    try:
        names = {concept(word) for word in words}
    except ValueError as error:
        raise InputError(
            f"--forget: {error}. Give words, not prompts; prompts belong to --forget_templates"
        ) from error
    if len(names) > 1:
        raise InputError(
            f"--forget names the concepts {', '.join(sorted(names))}; attack one at a time"
        )
    (name,) = names
    return "content" if name in CONTENTS else "style", name


def of_world(words: list[str]) -> list[Asked]:
    """The captions of training that name the concept with one of these words."""
    from ..worlds.styled_digits.captions import TRAINED, captions

    kind, _ = concept_of(words)
    found = []
    for c in captions(TRAINED):
        word = getattr(c, f"{kind}_word")
        if word and word.lower() in {w.lower() for w in words}:
            found.append(Asked(c.text, re.sub(rf"\b{word}\b", PLACE, c.text, count=1)))
    return found


def reworded(words: list[str], forgotten: set[str]) -> list[Wording]:
    """All captions that name the concept and are not in `forgotten`.

    They are grouped by word and by whether their template was held out of training."""
    from ..worlds.styled_digits.captions import CONTENTS, HELD_OUT, STYLES, TRAINED, captions

    kind, name = concept_of(words)
    found = []
    for word in {"content": CONTENTS, "style": STYLES}[kind][name]:
        for said, templates in (("trained", TRAINED), ("held out", HELD_OUT)):
            texts = [c.text for c in captions(templates) if getattr(c, f"{kind}_word") == word]
            texts = [t for t in texts if t not in forgotten]
            if texts:
                found.append(Wording(f"{word}, {said} templates", texts))
    return found


def one_token(tokenizer: Any, token: str) -> int:
    """The id of a word that is one token after another word.

    Byte-level tokenizers have another token for a word after a space than for one alone.

    Raises:
        InputError: the word is not exactly one token.
    """
    before, ids = (tokenizer(t, add_special_tokens=False).input_ids for t in ("a", f"a {token}"))
    ids = ids[len(before) :]
    if len(ids) != 1:
        raise InputError(
            f"--initializer_token {token!r} is {len(ids)} tokens "
            f"({' '.join(tokenizer.convert_ids_to_tokens(ids))}): give a word that is one token"
        )
    return ids[0]
