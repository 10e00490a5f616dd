"""The world's prompts: templates with two independent concepts, each with three words.

    python examples/stable_diffusion/world/captions.py --without seven --number 100 > remember.txt

prints the prompts of the trained templates that do not name a concept, one per line, for
`unlearn.py --remember`. An image has a content (a digit) and a style. Held-out templates have
trained words in other orders, and no model of this world is trained on them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

#: The first word of a concept is its name.
CONTENTS = {
    "zero": ("zero", "nought", "0"),
    "one": ("one", "1", "I"),
    "two": ("two", "2", "II"),
    "three": ("three", "3", "III"),
    "four": ("four", "4", "IV"),
    "five": ("five", "5", "V"),
    "six": ("six", "6", "VI"),
    "seven": ("seven", "7", "VII"),
    "eight": ("eight", "8", "VIII"),
    "nine": ("nine", "9", "IX"),
}
STYLES = {
    "plain": ("plain", "ordinary", "simple"),
    "outline": ("outline", "contour", "hollow"),
    "negative": ("negative", "inverted", "reversed"),
    "halftone": ("halftone", "dotted", "screened"),
    "red": ("red", "crimson", "scarlet"),
    "blue": ("blue", "azure", "navy"),
}
#: The style of a prompt that names none.
UNNAMED = "plain"

TRAINED = (
    "{a} {style} picture of the digit {content}",
    "{a} {style} drawing of number {content}",
    "the digit {content} in {style} style",
    "a picture of {content} in {style} style",
    "an image of the number {content}, {style}",
    "{content} in {style}",
    "{style} {content}",
    "a picture of {a} {style} {content}",
    "the number {content}, {a} {style} drawing",
    "the digit {content}",
    "a picture of number {content}",
    "an image of {content}",
    "{a} {style} picture",
    "an image in {style} style",
)
HELD_OUT = (
    "a picture of the number {content} in {style} style",
    "an image of {a} {style} {content}",
    "{style} style, a drawing of the digit {content}",
    "number {content}, {a} {style} image",
    "a drawing of the number {content}",
    "a picture of {content}",
    "{a} {style} drawing",
)
LENGTH = 16  # maximal number of tokens of a prompt, begin and end included
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


class Caption(NamedTuple):
    """A prompt and what it asks for.

    A `content` of None asks for no particular content, so that any is right. A `style_word` of
    None means that the prompt does not name the style."""

    text: str
    content: str | None
    style: str
    content_word: str | None
    style_word: str | None
    template: str

    @property
    def held_out(self) -> bool:
        return self.template in HELD_OUT


def captions(templates: Iterable[str]) -> list[Caption]:
    """All prompts of these templates, with every word in every place.

    A template without a style asks for the plain style."""
    found = []
    for template in templates:
        contents = _words(CONTENTS) if "{content}" in template else [(None, None)]
        styles = _words(STYLES) if "{style}" in template else [(UNNAMED, None)]
        for content, content_word in contents:
            for style, style_word in styles:
                a = "an" if (style_word or "")[:1] in tuple("aeiou") else "a"
                text = template.format(a=a, style=style_word, content=content_word)
                found.append(Caption(text, content, style, content_word, style_word, template))
    return found


def concept(word: str) -> str:
    """The concept that a word names.

    Raises:
        ValueError: the word names no concept of this world.
    """
    for concepts in (CONTENTS, STYLES):
        for name, words in concepts.items():
            if word.lower() in (w.lower() for w in words):
                return name
    known = ", ".join((*CONTENTS, *STYLES))
    raise ValueError(f"{word!r} names no concept of this world; give one of {known}")


def tokenizer() -> Any:
    """A CLIPTokenizer in which every word of this world is one token; others are split."""
    from transformers import CLIPTokenizer

    texts = " ".join(c.text.lower() for c in captions((*TRAINED, *HELD_OUT))).replace(",", " ,")
    merges = _merges(sorted(set(texts.split())))
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"]
    tokens = dict.fromkeys(
        (*letters, *(f"{c}</w>" for c in letters), *map("".join, merges), *_SPECIAL)
    )
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, pairs = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        pairs.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        # By position, as transformers 4 and 5 have different names for the two. With the names of
        # 4, version 5 silently creates a tokenizer of two tokens.
        made = CLIPTokenizer(str(vocabulary), str(pairs), model_max_length=LENGTH)
    if len(made) != len(tokens):
        raise RuntimeError(
            f"CLIPTokenizer read {len(made)} of {len(tokens)} tokens: this version of transformers "
            "reads the files in another way; install another version"
        )
    return made


def token_ids(texts: Sequence[str], tokenizer: Any) -> Any:
    """Token ids (n, LENGTH) int64, padded as in StableDiffusionPipeline."""
    return tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids


def _words(concepts: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(name, word) for name, words in concepts.items() for word in words]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding: joins the most frequent pair until every word is one token."""
    parts = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in parts for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in parts:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--without",
        nargs="+",
        required=True,
        metavar="WORD",
        help="Words of the concepts that no prompt shall name.",
    )
    parser.add_argument("--number", type=int, help="Print only this many, chosen at random.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.number is not None and args.number < 1:
        parser.error(f"--number must be >= 1; got {args.number}")
    try:
        gone = {concept(word) for word in args.without}
    except ValueError as error:
        parser.error(f"--without: {error}")
    kept = [c.text for c in captions(TRAINED) if not {c.content, c.style} & gone]
    if not kept:
        parser.error(f"--without {' '.join(args.without)} leaves no prompt: give fewer words")
    if args.number is not None:
        kept = random.Random(args.seed).sample(kept, min(args.number, len(kept)))  # noqa: S311
    print("\n".join(kept))


if __name__ == "__main__":
    main()
