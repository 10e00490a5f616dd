"""A recipe: what a method learns from, declared once, next to its rule."""

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

    Sets, memory counts, warnings, protocols and reports read the recipe, so a new method needs only
    a new recipe.

    Attributes:
        title: the name in tables.
        build: ``build(base, **options)`` makes the optimizer; ``build.keywords`` are the options
            that define the method, ``build.func.needs`` the phases that it needs. For an edit in
            closed form, the function of `ebu_optim.closed_form` that returns its matrix.
        strength: the option that is tuned, or None.
        forgets: the forget loss: "surrogate" (denoising of the mandatory distribution under
            the condition to forget), "own" (denoising of the class's own images), "relabel"
            (``relabel_loss`` on these images), "guidance" (``esd_loss``), "adapter" (``esd_loss``
            at points sampled with the adapter), "edit" (no loss: what is forgotten is read as what
            takes its place) or None.
        remembers: the remember loss: "replay" (denoising of replayed images), "distill"
            (the frozen model's prediction on these images), "crossed" (the same under other kept
            conditions), "anchors" (``anchor_loss`` on random embeddings) or None.
        fisher: the default source of F: "online", "estimated" (beforehand, over the replayed
            images), or None for a method without F.
        masked: a mask is made from the forget loss over the forget set before the first step.
        adapter: the method trains its own adapters in the transformer blocks of text-to-image
            models.
        embedding: the method trains only the class embedding.
        fresh: the method starts from random weights, on real images.
        noise: the noise of the "own" forget loss: "gaussian" or "uniform".
        adversary: the defaults for its adversarial embeddings ("steps", "restart", "weight",
            "loss"); empty for a method without any.
        held: how many numbers per weight the rule keeps between steps.
        learning_rate: of the published text-to-image run, 1e-5 unless stated.
        stalls: the step is zero if the remember gradient is zero. Distillation has a zero gradient
            at the start, so such a method would never begin.
        clips: whether the published text-to-image run clips gradients, at 1.
        published: the method's options in the published text-to-image runs.
        edits: for an edit in closed form, which takes no step: the ends of the names of the layers
            that it edits; else empty.
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
    edits: tuple[str, ...] = ()

    # -- what follows from these ------------------------------------------------------------------

    @property
    def own_images(self) -> bool:
        """Whether the forget loss uses images of what is forgotten."""
        return self.forgets in ("own", "relabel")

    @property
    def guided(self) -> bool:
        """Whether the forget loss is at points on the way from noise, sampled at every step."""
        return self.forgets in ("guidance", "adapter")

    @property
    def teacher(self) -> bool:
        """Whether the losses compare with the frozen model."""
        return self.remembers in ("distill", "crossed", "anchors") or self.forgets == "guidance"

    @property
    def replayed(self) -> bool:
        """Whether the remember loss uses images of what is kept, sampled beforehand."""
        return self.remembers in ("replay", "distill", "crossed")

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the method's options that may be set."""
        return tuple(self.defaults)

    @property
    def defaults(self) -> dict[str, Any]:
        """These options with their defaults."""
        known = inspect.signature(self.build.func).parameters
        fixed = {"base", "start", *self.build.keywords}
        return {
            n: p.default
            for n, p in known.items()
            if n not in fixed and not (self.edits and p.kind is not p.KEYWORD_ONLY)
        }

    def needs(self, **options: Any) -> tuple[str, ...]:
        """Return the phases that the method needs with these options.

        Raises:
            TypeError, ValueError: the method does not accept the options.
        """
        if self.edits:
            known = inspect.signature(self.build.func).parameters.values()
            of_one_number = [torch.zeros(1, 1)] * sum(p.default is p.empty for p in known)
            self.build(*of_one_number, **options)
            return ()
        base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        given = {"fisher": "online", **options} if self.fisher else options
        return self.build(base, **given).needs

    def with_losses(self, *, forget: str | None = None, remember: str | None = None) -> Recipe:
        """Return the same rule with other losses; None keeps the recipe's own loss.

        Args:
            forget: "surrogate" or "relabel", for a method whose own forget loss is one of them.
            remember: "replay", "distill" or "crossed", for a method whose own remember loss is one
                of them.

        Raises:
            ValueError: the method requires its own loss.
        """
        recipe = self
        if forget is not None and forget != self.forgets:
            if not {forget, self.forgets} <= {"surrogate", "relabel"}:
                raise ValueError(
                    f"forget={forget!r}: {self.title} has its own forget loss; leave forget out"
                )
            recipe = replace(recipe, forgets=forget)
        if remember is not None and remember != self.remembers:
            if not self.replayed or remember not in ("replay", "distill", "crossed"):
                raise ValueError(
                    f"remember={remember!r}: {self.title} has its own remember loss; "
                    "leave remember out"
                )
            recipe = replace(recipe, remembers=remember)
        return recipe


def recipe(title: str, cls: Callable[..., PhasedOptimizer], **about: Any) -> Recipe:
    """Return the recipe of a class with its default options."""
    return Recipe(title, partial(cls), **about)
