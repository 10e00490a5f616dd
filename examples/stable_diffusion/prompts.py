"""The prompts: which are forgotten, which answer instead, which are remembered."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sources import InputError
from torch import Tensor

REMEMBER = Path(__file__).with_name("remember_prompts.txt")


class Prompts(NamedTuple):
    """All prompts, and the numbers of those with a part to play; `shown` is for validation,
    `instead` has what may take the place of each forgotten one."""

    texts: list[str]
    forget: list[int]
    surrogate: list[int]
    remember: list[int]
    null: int
    shown: list[int]
    instead: dict[int, list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add("--forget", nargs="+", required=True, help="prompts, concepts or classes, or .txt files")
    add(
        "--forget_templates", nargs="+", default=["{}"],
        help='each concept is put into each, e.g. "an image of {}"; or .txt files',
    )  # fmt: skip
    add(
        "--surrogate_prompt", nargs="+", default=[""],
        help="whose images, or for SalUn predictions, take the place; default: the empty prompt",
    )  # fmt: skip
    add(
        "--surrogate_concept", nargs="+", default=[], metavar="CONCEPT",
        help="in place of --surrogate_prompt: what each concept becomes in its own template, so "
        "that the rest of a prompt keeps its meaning",
    )  # fmt: skip
    add(
        "--remember", dest="remember_prompts", nargs="+", default=[str(REMEMBER)],
        help=f'prompts or .txt files; "" is the empty prompt; default: {REMEMBER.name}',
    )  # fmt: skip


def read(values: Iterable[str], option: str) -> list[str]:
    """Prompts as given, and the lines of .txt files: blank ones and comments (#) are skipped, ""
    is the empty prompt."""
    found: list[str] = []
    for value in values:
        if not value.endswith(".txt"):
            found.append(value.strip())
            continue
        try:
            lines = [line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{option} {value} cannot be read: {error}") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise InputError(f"{option} {value} holds no prompt")
        found += ["" if line == '""' else line for line in lines]
    return list(dict.fromkeys(found))


def collect(args: argparse.Namespace, tokenizer: Any, warn: Any = print) -> Prompts:
    """Read and check the prompts that the options name.

    Raises:
        InputError: unreadable files; a prompt too long for the tokenizer; nothing to forget; a
            prompt to forget that is also remembered or the surrogate.
    """
    concepts = read(args.forget, "--forget")
    templates = read(args.forget_templates, "--forget_templates")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f'--forget_templates needs one "{{}}" in each; got {template!r}')
    forget = [t.replace("{}", c) for c in concepts for t in templates]
    others = read(args.surrogate_concept, "--surrogate_concept")
    if others and args.surrogate_prompt != [""]:
        raise InputError("--surrogate_concept and --surrogate_prompt: give one of them")
    # of each template, what may stand in it instead
    filled = {t: [t.replace("{}", c) for c in others] for t in templates}
    option = "--surrogate_concept" if others else "--surrogate_prompt"
    surrogate = read(args.surrogate_prompt, option)
    if others:
        surrogate = list(dict.fromkeys(text for texts in filled.values() for text in texts))
    remember = read(args.remember_prompts, "--remember")
    shown = args.validation_prompts or [forget[0], *remember[:3]]
    if not all(concepts):
        raise InputError(
            '--forget "": the empty prompt is the unconditional model, on which guidance of every '
            "prompt rests; name what is to be forgotten"
        )
    ids = {t: tuple(tokenizer(t).input_ids) for t in (*forget, *surrogate, *remember, *shown, "")}
    for text, tokens in ids.items():
        if len(tokens) > tokenizer.model_max_length:
            raise InputError(
                f"the prompt {text[:60]!r}... has {len(tokens)} tokens, begin and end included, "
                f"and the tokenizer takes {tokenizer.model_max_length}: shorten it"
            )
    gone = {ids[t] for t in forget}
    for name, texts in (("--remember", remember), (option, surrogate)):
        both = [t for t in texts if ids[t] in gone]
        if both:
            raise InputError(
                f"{name} {both[0]!r} is also to be forgotten: the two losses would pull the same "
                "prompt both ways; take it out of one"
            )
    named = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, concepts))})(?!\w)", re.IGNORECASE)
    mention = [t for t in remember if named.search(t)]
    if mention:
        warn(
            f"warning: {len(mention)} of the prompts to remember mention what is to be forgotten, "
            f"e.g. {mention[0]!r}: their images are held fast"
        )
    texts = list(dict.fromkeys((*forget, *surrogate, *remember, "", *shown)))
    number = {t: i for i, t in enumerate(texts)}
    forget = list(dict.fromkeys(forget))
    parts = [[number[t] for t in part] for part in (forget, surrogate, remember, shown)]
    instead: dict[int, list[int]] = {i: [] for i in parts[0]}
    for t in templates:
        for c in concepts:
            instead[number[t.replace("{}", c)]] += [number[o] for o in filled[t]] or parts[1]
    return Prompts(texts, *parts[:3], number[""], parts[3], instead)


@torch.no_grad()
def encode(texts: Sequence[str], tokenizer: Any, text_encoder: Any, batch: int = 32) -> Tensor:
    """Text embeddings (n, L, D), float32 on the CPU, as StableDiffusionPipeline makes them."""
    found = []
    for i in range(0, len(texts), batch):
        given = tokenizer(
            list(texts[i : i + batch]), padding="max_length", truncation=True,
            max_length=tokenizer.model_max_length, return_tensors="pt",
        )  # fmt: skip
        mask = given.attention_mask.to(text_encoder.device)
        mask = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
        found.append(text_encoder(given.input_ids.to(text_encoder.device), mask)[0].float().cpu())
    return torch.cat(found)


def words(text: str, tokenizer: Any) -> set[int]:
    """Its tokens without begin, end and padding."""
    return set(tokenizer(text).input_ids) - set(tokenizer.all_special_ids)
