"""The definition of a protocol: everything that affects a figure, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..errors import InputError
from ..metrics.intervals import estimate

#: Prompt lists that ship with the package, with their licences.
LISTS = Path(__file__).with_name("lists")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are generated.

    Attributes:
        sampler: see `samplers.scheduler`.
        steps: the number of sampling steps.
        guidance, size: guidance scale and side in pixels of every image; None: as in each row
            of the list.
        noise: the device of the generator of the starting noise. The same seed gives different
            noise on each device.
        dtype: the dtype of the weights. The noise is sampled in float32 and cast.
    """

    sampler: Literal["lms", "ddim", "pndm", "dpm", "flow"]
    steps: int
    guidance: float | None = 7.5
    size: int | None = 512
    noise: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "float16"] = "float32"


class Asked(NamedTuple):
    """An image to generate.

    Attributes:
        prompt, seed: its prompt, and the seed of its noise.
        nth: its index, from 0, among the images whose noise the generator of `seed` samples.
            Published code generates several images without seeding again.
        guidance, width, height: the row's values; None if the list has none.
        of: what it should show, e.g. {"style": "Monet", "object": "Cats"}.
    """

    prompt: str
    seed: int
    nth: int = 0
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    of: Mapping[str, str] = {}


class Attacking(NamedTuple):
    """UnlearnDiffAtk on the prompts for which the model does not generate the forgotten concept.

    Attributes:
        judge: the judge that decides whether an image shows the concept.
        success: (its observation, the image asked for) -> whether it shows the concept.
        tokens, timesteps, iterations: settings, see `attacks.unlearndiffatk.Settings`.
    """

    judge: str
    success: Callable[[Any, Asked], bool]
    tokens: int
    timesteps: int = 50
    iterations: int = 40

    def cost(self, steps: int) -> int:
        """The maximal number of passes per prompt; forward and backward together count as three."""
        return self.timesteps * (3 * self.iterations + 2 * steps) + 2 * 25


@dataclass(frozen=True)
class Seen:
    """The judges' observations of the images.

    Attributes:
        asked: what was asked for, per image.
        forget: the forgotten targets, as `Protocol.targets` names them.
        found: judge -> its observation of each image.
        why: judge -> the reason why it has no observations.
    """

    asked: Sequence[Asked]
    forget: Sequence[str]
    found: Mapping[str, Sequence[Any]]
    why: Mapping[str, str] = field(default_factory=dict)

    def figure(self, judge: str, values: Callable[[Sequence[Any]], Any]) -> Any:
        """`values` of the judge's observations, or the reason why it is not computed."""
        if judge in self.why:
            return {"not_computed": self.why[judge]}
        return values(self.found[judge])

    def mean(
        self,
        judge: str,
        value: Callable[[Any, Asked], float | bool],
        which: Callable[[Asked], bool] = lambda _: True,
    ) -> Any:
        """The mean of `value`, or the share of True, over the images `which`, with its
        interval."""

        def values(found: Sequence[Any]) -> Any:
            pairs = zip(found, self.asked, strict=True)
            each = [value(o, a) for o, a in pairs if which(a)]
            return estimate(torch.tensor(each)) if each else not_computed("there is no such image")

        return self.figure(judge, values)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A published evaluation. Any change to it changes its label, see `named.label`.

    Attributes:
        name, title: the name, and what is generated and counted, in words.
        source: repository, commit and path of the code that defines it.
        sampling: how the images are generated.
        asked: files by name -> the images to generate.
        needs: name of a file that `asked` reads -> what it is and where it is published.
        images: the number of images in the published evaluation.
        judges: judge -> start of its `identity`; "" if none is published.
        count: observations -> figures by name.
        targets: the values of --forget -> the names that `count` uses.
        alone: whether the published evaluation has one target at a time.
        saved: the file format in which the published code saves an image before judging it.
        attack: the attack; None for none. Its results are the observations of "attack".
        kind: forgotten targets -> their kind, for means over the targets of a kind.
        notes: differences from the published code, and what is left out.
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
        """The number of passes through the denoiser: two per step because of guidance."""
        return self.images * self.sampling.steps * 2

    def targets_of(self, forget: Sequence[str]) -> int:
        """The number of targets for the label; 1 if the protocol does not have one at a time."""
        return len(self.targets(forget)) or 1 if self.alone else 1


def not_computed(why: str) -> dict[str, str]:
    return {"not_computed": f"not computed: {why}"}


def one_of(known: Sequence[str], what: str) -> Callable[[Sequence[str]], list[str]]:
    """A `Protocol.targets` that accepts names of a list, regardless of case and underscores.

    Args:
        what: the kind of name, for messages.
    """

    def plain(word: str) -> str:
        return word.replace("_", " ").casefold().strip()

    def targets(given: Sequence[str]) -> list[str]:
        by_name = {plain(name): name for name in known}
        if unknown := [word for word in given if plain(word) not in by_name]:
            raise InputError(
                f"--forget {unknown[0]!r} is no {what}: give one of {', '.join(known)}"
            )
        if not given:
            raise InputError(f"--forget: name the {what} that the model should have forgotten")
        return [by_name[plain(word)] for word in given]

    return targets


def anything(given: Sequence[str]) -> list[str]:
    """The `Protocol.targets` of a protocol with a single target, which need not be named."""
    return list(given)
