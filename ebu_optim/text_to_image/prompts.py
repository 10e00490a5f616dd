"""The prompts of a run: to forget, to generate instead (surrogate) and to remember."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..training.fields import named, option
from .prompt_files import listed, read

PLACE = "{}"  # the place of the concept in a template
REMEMBER = Path(__file__).with_name("remember_prompts.txt")


class Prompts(NamedTuple):
    """All prompts of a run; the other attributes are indices into `texts`.

    Attributes:
        texts: all prompts, each once.
        forget, surrogate, remember: the prompts in these parts.
        null: the empty prompt.
        shown: the prompts of the validation images.
        instead: prompt to forget -> the prompts that may replace it.
        attacks: the prompts at which adversaries start.
    """

    texts: list[str]
    forget: list[int]
    surrogate: list[int]
    remember: list[int]
    null: int
    shown: list[int]
    instead: dict[int, list[int]]
    attacks: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompts to forget, to generate instead and to remember."""

    group: ClassVar[str] = "prompts"

    forget: list[str] = option(
        help="What to forget: prompts, concepts or class names, or files of them."
    )
    forget_templates: list[str] = option(
        [PLACE],
        help='Templates for each concept, e.g. "an image of {}"; or files of them.',
    )
    surrogate_prompt: list[str] = option(
        [""],
        help="Prompts whose images (for SalUn: predictions) replace those of the prompts to "
        "forget. Default: the empty prompt.",
    )
    surrogate_concept: list[str] = option(
        [],
        metavar="CONCEPT",
        help="Instead of --surrogate_prompt: what each concept becomes within the same template, "
        "so that the rest of the prompt keeps its meaning.",
    )
    surrogate_pairing: Literal["any", "each"] = option(
        "any",
        help="any: every --surrogate_concept may replace every concept; each: the first replaces "
        "the first concept, the second the second, and so on.",
    )
    remember_prompts: list[str] = option(
        [str(REMEMBER)],
        flag="--remember",
        help='Prompts to remember, or files of them (.txt, .csv, .parquet); "" is the empty '
        f"prompt. Default: {REMEMBER.name}.",
    )
    adversary_prompts: list[str] = option(
        [],
        metavar="PROMPT",
        help="Prompts, or files of them, at which adversaries start before they start at random; "
        "for example prompts that an attack found.",
    )


def collect(args: Any, tokenizer: Any, warn: Any = print) -> Prompts:
    """Read and check the prompts that the options name.

    Raises:
        InputError: a file cannot be read; a prompt is too long for the tokenizer; there is nothing
            to forget; a prompt to forget is also remembered or a surrogate.
    """
    called = {n: named(args, n) for n in ("forget", "surrogate_concept", "remember_prompts")}
    concepts = read(args.forget, called["forget"])
    templates = read(args.forget_templates, "--forget_templates")
    check_templates(templates)
    if not all(concepts):
        raise InputError(
            f'{called["forget"]} "": the empty prompt is the unconditional model, which the '
            "guidance of every prompt uses; name a concept to forget"
        )
    others = read(args.surrogate_concept, called["surrogate_concept"])
    if others and args.surrogate_prompt != [""]:
        raise InputError(f"{called['surrogate_concept']} and --surrogate_prompt: give one of them")
    becomes = _becomes(args, concepts, others)
    option = called["surrogate_concept"] if others else "--surrogate_prompt"
    plain = read(args.surrogate_prompt, option)
    # each prompt to forget -> the prompts that may replace it
    instead: dict[str, list[str]] = {fill(t, c): [] for c, t in product(concepts, templates)}
    for t, (c, own) in product(templates, becomes):
        instead[fill(t, c)] += [fill(t, o) for o in own] or plain
    forget = list(instead)
    surrogate = [fill(t, o) for t in templates for o in others] or plain
    remember = read(args.remember_prompts, called["remember_prompts"])
    attacks = read(args.adversary_prompts, "--adversary_prompts") if args.adversary_prompts else []
    shown = args.validation_prompts or [forget[0], *remember[:3]]
    of = {called["forget"]: forget, option: surrogate, called["remember_prompts"]: remember}
    others_too = {"--validation_prompts": shown, "--adversary_prompts": attacks}
    for name, given in {**of, **others_too}.items():
        check_lengths(given, tokenizer, option=name)
    _check_apart(forget, {n: t for n, t in of.items() if t is not forget}, tokenizer)
    _warn_of_mentions(concepts, remember, warn)
    texts = list(dict.fromkeys((*forget, *surrogate, *remember, "", *shown, *attacks)))
    number = {t: i for i, t in enumerate(texts)}

    def numbers(of: Iterable[str]) -> list[int]:
        return [number[t] for t in of]

    return Prompts(
        texts,
        numbers(forget),
        numbers(dict.fromkeys(surrogate)),
        numbers(remember),
        number[""],
        numbers(shown),
        {number[t]: numbers(found) for t, found in instead.items()},
        numbers(attacks),
    )


def _becomes(args: Any, concepts: list[str], others: list[str]) -> list[tuple[str, Sequence[str]]]:
    """Each concept, and the concepts that may replace it."""
    if args.surrogate_pairing == "any":
        return [(c, others) for c in concepts]
    called = [named(args, n) for n in ("forget", "surrogate_concept")]
    # with duplicates, as two concepts may become the same
    gone, own = (
        [row.prompt for row in listed(getattr(args, n), of)]
        for n, of in zip(("forget", "surrogate_concept"), called)
    )
    if len(gone) != len(own):
        raise InputError(
            f"--surrogate_pairing each: {called[0]} has {len(gone)} and {called[1]} {len(own)}; "
            "give one for each concept"
        )
    return [(c, [o]) for c, o in zip(gone, own)]


def fill(template: str, word: str) -> str:
    return template.replace(PLACE, word)


def check_templates(templates: Iterable[str], option: str = "--forget_templates") -> None:
    """Check that each template has one place for the concept.

    Raises:
        InputError: a template has none, or several.
    """
    for template in templates:
        if template.count(PLACE) != 1:
            raise InputError(f'{option} needs exactly one "{PLACE}" in each; got {template!r}')


def check_lengths(texts: Iterable[str], tokenizer: Any, remedy: str = "", option: str = "") -> None:
    """Check that the tokenizer need not cut any prompt.

    Args:
        remedy: a remedy for the message, in addition to a shorter prompt.
        option: the option whose prompts they are, for the message.

    Raises:
        InputError: a prompt has more tokens than the tokenizer takes.
    """
    for text in texts:
        if (n := len(tokenizer(text).input_ids)) > tokenizer.model_max_length:
            raise InputError(
                f"{option}{': ' * bool(option)}the prompt {text[:60]!r}... has {n} tokens, "
                f"begin and end included, and the tokenizer takes {tokenizer.model_max_length}: "
                f"shorten it{f', {remedy}' if remedy else ''}"
            )


def _check_apart(forget: list[str], others: Mapping[str, list[str]], tokenizer: Any) -> None:
    gone = {tuple(tokenizer(t).input_ids) for t in forget}
    for name, texts in others.items():
        both = [t for t in texts if tuple(tokenizer(t).input_ids) in gone]
        if both:
            raise InputError(
                f"{name} {both[0]!r} is also a prompt to forget: the two losses would pull the "
                "same prompt both ways; remove it from one of the two"
            )


def _warn_of_mentions(concepts: list[str], remember: list[str], warn: Any) -> None:
    named = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, concepts))})(?!\w)", re.IGNORECASE)
    mention = [t for t in remember if named.search(t)]
    if mention:
        warn(
            f"warning: {len(mention)} of the prompts to remember mention a concept to forget, "
            f"e.g. {mention[0]!r}: training preserves their images, too"
        )


def encode(texts: Sequence[str], tokenizer: Any, text_encoder: Any, batch: int = 32) -> Tensor:
    """Text embeddings (n, L, D), float32 on the CPU, as StableDiffusionPipeline computes them."""
    found = []
    for i in range(0, len(texts), batch):
        given = tokenizer(
            list(texts[i : i + batch]),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        mask = given.attention_mask.to(text_encoder.device)
        mask = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        found.append(text_encoder(given.input_ids.to(text_encoder.device), mask)[0].float().cpu())
    return torch.cat(found)


def words(text: str, tokenizer: Any) -> set[int]:
    """The prompt's tokens without begin, end and padding."""
    return set(tokenizer(text).input_ids) - set(tokenizer.all_special_ids)
