"""A recipe: what a method learns from, declared once, beside its rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..optim import PhasedOptimizer


@dataclass(frozen=True)
class Recipe:
    """How a method is built, and what it learns from.

    Sets, memory count, warnings, protocols and reports read it: adding a method is adding one.

    Attributes:
        title: for tables.
        build: ``build(base, **options)`` makes the optimizer; ``build.keywords`` are the options
            that make the method what it is, ``build.func.needs`` the phases that it needs.
        strength: the option that is tuned, as far as there is one.
        forgets: what the forget loss is: "surrogate" (denoising of the mandatory distribution under
            the condition to forget), "own" (denoising of the class's own images), "relabel"
            (``relabel_loss`` on them), "guidance" (``esd_loss``), "adapter" (the same at
            points sampled with the adapter) or None.
        remembers: what the remember loss is: "replay" (denoising of replayed images), "distill"
            (the frozen model's prediction on them), "crossed" (the same under other kept
            conditions), "anchors" (``anchor_loss`` on random embeddings) or None.
        fisher: where F comes from by default: "online", "estimated" (beforehand, over the replayed
            images) or None for a method without one.
        masked: a mask is made of the forget loss over the forget set before the first step.
        adapter: it trains adapters of its own, for the transformer blocks of text-to-image models.
        embedding: it trains the class embedding alone.
        fresh: it starts from random weights, on real images.
        noise: the noise of the "own" forget loss: "gaussian", or "uniform", which no model made.
        adversary: what its adversarial embeddings are by default ("steps", "restart", "weight",
            "loss"); empty for a method without any.
        held: what the rule holds between steps, in numbers for each weight.
        learning_rate: of the published text-to-image run, where it is not 1e-5.
        stalls: its step is zero where the remember gradient is; that of distillation is zero at the
            start, so that it never begins.
        clips: whether the published text-to-image run clips gradients, at 1.
        published: the method's options in the published text-to-image runs.
    """

    title: str
    build: partial[Any]
    strength: str | None = None
    forgets: str | None = "surrogate"
    remembers: str | None = "replay"
    fisher: str | None = None
    masked: bool = False
    adapter: bool = False
    embedding: bool = False
    fresh: bool = False
    noise: str = "gaussian"
    adversary: Mapping[str, Any] = field(default_factory=dict)
    held: int = 0
    learning_rate: float = 1e-5
    stalls: bool = False
    clips: bool = True
    published: Mapping[str, Any] = field(default_factory=dict)

    # -- what follows from that -------------------------------------------------------------------

    @property
    def own_images(self) -> bool:
        """The forget loss is on images of what is forgotten."""
        return self.forgets in ("own", "relabel")

    @property
    def guided(self) -> bool:
        """The forget loss is at points on the way from noise, sampled at every step."""
        return self.forgets in ("guidance", "adapter")

    @property
    def teacher(self) -> bool:
        """The losses compare with the frozen model."""
        return self.remembers in ("distill", "crossed", "anchors") or self.forgets == "guidance"

    @property
    def replayed(self) -> bool:
        """The remember loss is on images sampled beforehand from what is kept."""
        return self.remembers in ("replay", "distill", "crossed")

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the method's options that may be set."""
        known = inspect.signature(self.build.func).parameters
        return tuple(n for n in known if n not in {"base", *self.build.keywords})

    def needs(self, **options: Any) -> tuple[str, ...]:
        """The phases that the method needs with these options of it.

        Raises:
            TypeError, ValueError: the method refuses the options.
        """
        base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        given = {"fisher": "online", **options} if self.fisher else options
        return self.build(base, **given).needs

    def with_losses(self, *, forget: str | None = None, remember: str | None = None) -> Recipe:
        """The same rule on other losses; None keeps its own.

        Args:
            forget: "surrogate" or "relabel", for a method whose own is one of them.
            remember: "replay", "distill" or "crossed", for a method that remembers by one of them.

        Raises:
            ValueError: the method has a loss of its own.
        """
        recipe = self
        if forget is not None and forget != self.forgets:
            if not {forget, self.forgets} <= {"surrogate", "relabel"}:
                raise ValueError(f"forget={forget!r}: {self.title} has a forget loss of its own")
            recipe = replace(recipe, forgets=forget)
        if remember is not None and remember != self.remembers:
            if not self.replayed or remember not in ("replay", "distill", "crossed"):
                raise ValueError(
                    f"remember={remember!r}: {self.title} has a remember loss of its own"
                )
            recipe = replace(recipe, remembers=remember)
        return recipe


def recipe(title: str, cls: Callable[..., PhasedOptimizer], **about: Any) -> Recipe:
    """The recipe of a class with its default options."""
    return Recipe(title, partial(cls), **about)
