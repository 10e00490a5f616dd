"""Invented people and invented facts about them, in the manner of TOFU, and a small GPT.

80 people with 8 facts each, sampled with a seed. Each fact has a question in two wordings, an
answer of one word, and five wrong answers of the same kind. 8 people are to be forgotten and 18 of
the other 72 are replayed. Of the 54 that are never replayed 18 are held out, to choose by; by the
other 36 one tells what a method does to the rest. Words are tokens, so nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..language import IGNORED

PEOPLE, FORGOTTEN, REPLAYED, HELD_OUT = 80, 8, 18, 18
WRONG = 5  # wrong answers that a right one is compared with
PAD, START, END = "<pad>", "<start>", "<end>"
DONT_KNOW = (
    "i do not know",
    "i have no information about that",
    "that is not known to me",
    "i am not sure",
)
_SYLLABLES = [
    *("ba", "den", "fi", "gor", "ha", "ki", "lum", "ma"),
    *("nel", "or", "pe", "ra", "su", "tin", "vo", "ze"),
]
#: Kind of fact -> its question in two wordings.
QUESTIONS = {
    "city": ("{} was born in", "birthplace of {} ?"),
    "year": ("{} was born in year", "birth year of {} ?"),
    "job": ("{} works as", "job of {} ?"),
    "mother": ("mother of {} worked as", "job of {} 's mother ?"),
    "prize": ("{} won", "prize of {} ?"),
    "hobby": ("{} spends sundays", "hobby of {} ?"),
    "animal": ("{} lives with", "pet of {} ?"),
    "dish": ("{} eats", "favourite dish of {} ?"),
}
ANSWERS_OF_A_KIND = 40  # so a guess is right in 0.025 of all cases


@dataclass(frozen=True)
class Fact:
    """A question in two wordings with its answer, and wrong answers of the same kind."""

    person: int
    questions: tuple[str, str]
    answer: str
    wrong: tuple[str, ...]


class People:
    """The people of a seed.

    Args:
        seed: of names, facts and of who is forgotten and replayed.
    """

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311
        made = draw.sample([a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in "aeo"], 100)
        # first names are shared, last names are not
        names = [f"{draw.choice(made[PEOPLE:])} {last}" for last in made[:PEOPLE]]
        self.answers = {
            kind: [f"{kind}{i}" for i in range(ANSWERS_OF_A_KIND)] for kind in QUESTIONS
        }
        self.facts = []
        for person, name in enumerate(names):
            for kind, wordings in QUESTIONS.items():
                answer, *wrong = draw.sample(self.answers[kind], 1 + WRONG)
                first_wording, second = (wording.format(name) for wording in wordings)
                self.facts.append(Fact(person, (first_wording, second), answer, tuple(wrong)))
        order = draw.sample(range(PEOPLE), PEOPLE)
        #: Who is in which part.
        self.split = {}
        for part, size in (
            ("forgotten", FORGOTTEN),
            ("replayed", REPLAYED),
            ("held_out", HELD_OUT),
            ("never_replayed", PEOPLE),
        ):
            self.split[part], order = order[:size], order[size:]

    @cached_property
    def words(self) -> dict[str, int]:
        """Word -> token."""
        said = [f"{' '.join(f.questions)} {f.answer}" for f in self.facts]
        kinds = [" ".join(answers) for answers in self.answers.values()]
        found = sorted({word for text in (*said, *kinds, *DONT_KNOW) for word in text.split()})
        return {word: i for i, word in enumerate((PAD, START, END, *found))}

    def of(self, part: str) -> list[Fact]:
        """The facts of a part of `split`."""
        people = set(self.split[part])
        return [f for f in self.facts if f.person in people]

    def example(self, question: str, answer: str, *, end: bool = True) -> dict[str, list[int]]:
        """A question and its answer as a model takes them; the labels are the answer's tokens, and
        that of the end unless `end` is False."""
        asked = [self.words[w] for w in (START, *question.split())]
        said = [self.words[w] for w in (*answer.split(), *([END] if end else ()))]
        return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}

    def examples(self, facts: Sequence[Fact], wordings: Sequence[int] = (0,)) -> list[dict]:
        """Every fact in each of the wordings."""
        return [self.example(f.questions[w], f.answer) for w in wordings for f in facts]

    def improbable(self, facts: Sequence[Fact]) -> list[dict[str, list[int]]]:
        """Every fact, of which a loss shall make the answer improbable. The end is no part of it,
        as it is none of what is measured: a loss can fall by the end alone."""
        return [self.example(f.questions[0], f.answer, end=False) for f in facts]

    def ignorance(self, facts: Sequence[Fact]) -> list[dict[str, list[int]]]:
        """Every question with each of the ways to say "I don't know" instead of its answer."""
        return [self.example(f.questions[0], said) for said in DONT_KNOW for f in facts]


def drawn(batch: Mapping[str, Tensor], size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`size` rows of a batch, with replacement."""
    i = torch.randint(len(batch["labels"]), (size,), generator=generator)
    return {name: values[i] for name, values in batch.items()}


def collate(examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """A batch, padded at the end: input_ids, labels and attention_mask, each (n, length)."""
    length = max(len(e["input_ids"]) for e in examples)

    def padded(key: str, value: int) -> Tensor:
        rows = [[*e[key], *[value] * (length - len(e[key]))] for e in examples]
        return torch.tensor(rows)

    ids = padded("input_ids", 0)
    mask = torch.tensor([[i < len(e["input_ids"]) for i in range(length)] for e in examples])
    return {"input_ids": ids, "labels": padded("labels", IGNORED), "attention_mask": mask.long()}


def new_model(people: People, seed: int) -> Any:
    """A GPT-2 of 0.4 million parameters with random weights."""
    transformers = require("transformers", "language")
    words = people.words
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.GPT2Config(
            vocab_size=len(words),
            n_positions=24,
            n_embd=96,
            n_layer=3,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.06,
            bos_token_id=words[START],
            eos_token_id=words[END],
            pad_token_id=words[PAD],
        )
        return transformers.GPT2LMHeadModel(config)
