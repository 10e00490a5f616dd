"""What a protocol is: everything that moves a figure, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..errors import InputError
from ..metrics.intervals import estimate

#: Prompt lists that the package brings; their licences are beside them.
LISTS = Path(__file__).with_name("lists")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn.

    Attributes:
        sampler: see `samplers.scheduler`.
        guidance, size: of every picture; None: of each row of the list.
        noise: device of the generator that the starting noise comes from. One seed makes other
            noise on each.
        dtype: of the weights while drawing. The noise is drawn in float32 and cast.
    """

    sampler: Literal["lms", "ddim", "pndm", "dpm"]
    steps: int
    guidance: float | None = 7.5
    size: int | None = 512
    noise: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float16"] = "float32"


class Asked(NamedTuple):
    """One picture.

    Attributes:
        nth: which of the pictures that the generator of `seed` makes noise for, from 0: published
            code draws several prompts or pictures in a row without seeding anew.
        guidance, width, height: of the row, where the list has them.
        of: what it is to show, e.g. {"style": "Monet", "object": "Cats"}.
    """

    prompt: str
    seed: int
    nth: int = 0
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    of: Mapping[str, str] = {}


class Attacking(NamedTuple):
    """UnlearnDiffAtk on the prompts that do not draw what was forgotten.

    Attributes:
        judge: who says whether they do.
        success: its observation, what was asked -> yes or no.
        tokens, timesteps, iterations: of the search, see `attacks.unlearndiffatk.Settings`.
    """

    judge: str
    success: Callable[[Any, Asked], bool]
    tokens: int
    timesteps: int = 50
    iterations: int = 40

    def cost(self, steps: int) -> int:
        """Passes for a prompt, at most: forward and backward count as three."""
        return self.timesteps * (3 * self.iterations + 2 * steps) + 2 * 25


@dataclass(frozen=True)
class Seen:
    """What the judges said of the pictures.

    Attributes:
        asked: of each picture.
        forget: what is to be gone, as `Protocol.targets` names it.
        found: judge -> an observation for each picture.
        why: judge -> why there are none.
    """

    asked: Sequence[Asked]
    forget: Sequence[str]
    found: Mapping[str, Sequence[Any]]
    why: Mapping[str, str] = field(default_factory=dict)

    def figure(self, judge: str, values: Callable[[Sequence[Any]], Any]) -> Any:
        """What `values` makes of the judge's observations; or why it is not computed."""
        if judge in self.why:
            return {"not_computed": self.why[judge]}
        return values(self.found[judge])

    def mean(
        self,
        judge: str,
        value: Callable[[Any, Asked], float | bool],
        which: Callable[[Asked], bool] = lambda _: True,
    ) -> Any:
        """The mean of a number, or the share of a yes, over the pictures `which`, with its
        interval."""

        def values(found: Sequence[Any]) -> Any:
            pairs = zip(found, self.asked, strict=True)
            each = [value(o, a) for o, a in pairs if which(a)]
            return (
                estimate(torch.tensor(each)) if each else not_computed("there is no such picture")
            )

        return self.figure(judge, values)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A published evaluation. It is called by its name only as it is here: see `named.label`.

    Attributes:
        name, title: `title` says in words what is drawn and counted.
        source: repository, commit and path of the code that defines it.
        asked: files by name -> the pictures.
        needs: name of a file that `asked` reads -> what it is and where it is published.
        images: how many pictures the published evaluation has.
        judges: judge -> how its `identity` begins; "" where nothing is published.
        count: the figures by name.
        targets: what --forget gives -> the names that `count` knows.
        alone: whether the published evaluation is of one target.
        saved: as which file published code keeps a picture before it is judged.
        attack: None where there is none. What it reached is observed by "attack".
        kind: what is forgotten -> what kind of target it is, where means are over those of a kind.
        notes: what differs from the published code, and what is left out.
    """

    name: str
    title: str
    source: str
    sampling: Sampling
    asked: Callable[[Mapping[str, Path]], list[Asked]]
    needs: Mapping[str, str] = field(default_factory=dict)
    images: int
    judges: Mapping[str, str]
    count: Callable[[Seen], dict[str, Any]]
    targets: Callable[[Sequence[str]], list[str]]
    alone: bool = True
    saved: Literal["png", "jpeg"] = "png"
    attack: Attacking | None = None
    kind: Callable[[Sequence[str]], str] = lambda _: ""
    notes: tuple[str, ...] = ()

    @property
    def cost(self) -> int:
        """Passes through the denoiser: two a step, of guidance."""
        return self.images * self.sampling.steps * 2

    def targets_of(self, forget: Sequence[str]) -> int:
        """For the label: how many targets there are where one is published."""
        return len(self.targets(forget)) or 1 if self.alone else 1


def not_computed(why: str) -> dict[str, str]:
    return {"not_computed": f"not computed: {why}"}


def one_of(known: Sequence[str], what: str) -> Callable[[Sequence[str]], list[str]]:
    """`Protocol.targets`: names out of a list, however they are written."""

    def plain(word: str) -> str:
        return word.replace("_", " ").casefold().strip()

    def targets(given: Sequence[str]) -> list[str]:
        by_name = {plain(name): name for name in known}
        if unknown := [word for word in given if plain(word) not in by_name]:
            raise InputError(f"--forget {unknown[0]!r} is no {what}: there is {', '.join(known)}")
        if not given:
            raise InputError(f"--forget: name the {what} that is to be gone")
        return [by_name[plain(word)] for word in given]

    return targets


def anything(given: Sequence[str]) -> list[str]:
    """`Protocol.targets` of a protocol that has one target, which nobody needs to name."""
    return list(given)
