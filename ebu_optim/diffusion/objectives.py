"""The forget and the remember loss of unlearn.py, chosen by the method and the options."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..baselines import Recipe, recipes
from ..errors import InputError
from ..modules import evaluating
from ..training.adversary import attacked
from ..training.data import Batches
from ..training.fields import option
from .attackers import Attackers
from .guidance import esd_loss, partly_denoised
from .losses import (
    denoising_loss,
    distillation_loss,
    gaussian_forget_loss,
    noisy_condition,
    surrogate_noise,
)
from .relabel import next_class, relabel_loss

REMEMBER_LOSS = (
    "Remember loss: replayed pairs, the frozen model's predictions on them (distillation), or "
    "these under newly sampled conditions (crossed distillation)."
)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Which losses a method learns from, if the method leaves this open."""

    group: ClassVar[str] = "losses"

    condition_noise: float = option(
        0.0,
        help="Gaussian noise on the forgotten condition's embedding in the forget loss; 1 is "
        "as much as the embedding's own spread.",
    )
    forget_loss: Literal["surrogate", "relabel"] | None = option(
        None,
        help="surrogate: the surrogate's images under the forgotten condition; relabel: "
        "SalUn's loss, on images of what is forgotten. Default: the method's own.",
    )
    remember: Literal["replay", "distill", "crossed"] = option("replay", help=REMEMBER_LOSS)
    reduction: Literal["sum", "mean"] = option("sum", help="Reduction of the losses over C, H, W.")

    def check_losses(self: Any) -> None:
        """Raise InputError for losses that the method cannot use.

        These are noise on a condition that the target compares, and a forget loss for a method
        that requires its own.
        """
        if not 0 <= self.condition_noise < math.inf:
            raise InputError(f"--condition_noise must be finite, >= 0; got {self.condition_noise}")
        if self.condition_noise and kind(self) in ("guidance", "adapter"):
            raise InputError(
                f"--condition_noise: not possible with --method {self.method}, because its target "
                "compares conditions, and all of them would get the noise; leave it out"
            )
        try:
            recipe_of(self)
        except ValueError as error:
            raise InputError(
                f"--forget_loss: {self.method} has its own forget loss; leave --forget_loss out"
            ) from error


def recipe_of(args: Any) -> Recipe:
    """Return the method's recipe with the losses that the options choose.

    Raises:
        ValueError: --forget_loss for a method that has its own forget loss.
    """
    own = recipes[args.method]
    # a method with its own remember loss keeps it; the run warns that --remember has no effect
    return own.with_losses(
        forget=args.forget_loss, remember=args.remember if own.replayed else None
    )


def kind(args: Any) -> str | None:
    """Return the kind of the forget loss: --forget_loss, or the method's; see `Recipe.forgets`."""
    return args.forget_loss or recipes[args.method].forgets


def needs_own_images(args: Any) -> str | None:
    """Return the option that makes the losses need real images of the class to forget, or None."""
    if attacked(args):
        return "--adversary_steps"
    if args.relearner_steps:
        return "--relearner_steps"
    if recipe_of(args).own_images:
        return "--forget_loss relabel" if args.forget_loss else f"--method {args.method}"
    return None


def needs_teacher(args: Any) -> bool:
    """Whether the losses compare with the frozen model."""
    return recipe_of(args).teacher or bool(attacked(args) and args.adversary_loss == "teacher")


NOISE = ("uniform", "gaussian", "analytic")  # surrogates that are sampled in each step


class Objectives:
    """``at(i)`` chooses the i-th batches; ``forget()`` and ``remember()`` are the losses on them.

    Args:
        made: what prepare.py made.
        model: the model as accelerate prepared it; `raw` is the module inside.
        teacher: the frozen base model for distillation, or None.
        shape: (C, H, W) of an image.
        kept: images and labels to remember instead of the replayed ones.
    """

    attackers: Attackers | None = None

    def __init__(
        self,
        args: Any,
        made: Any,
        model: Any,
        raw: Any,
        teacher: Any,
        scheduler: Any,
        accelerator: Any,
        shape: Sequence[int],
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.args, self.model, self.raw, self.teacher = args, model, raw, teacher
        self.scheduler, self.device, self.forgotten = scheduler, accelerator.device, made.forget
        self.kind = kind(args)
        self.classes = raw.config.num_class_embeds - 1
        shared: dict[str, Any] = {
            "process": accelerator.process_index,
            "processes": accelerator.num_processes,
            "device": accelerator.device,
        }
        pairs: Any = kept or made.replay
        size = args.train_batch_size
        self.replayed: Any = pairs and Batches(pairs[0], pairs[1], size, **shared, seed=args.seed)
        source: Any = made.own if recipe_of(args).own_images else None
        source = source or (None if args.surrogate in NOISE else made.surrogate)
        self.own: Any = source and Batches(source[0], source[1], size, **shared, seed=args.seed + 1)
        self.sampler = self.new_sampler()
        self.null = self.classes
        self.shape = (args.train_batch_size, *shape)
        self.crossed = torch.tensor([c for c in range(self.classes) if c not in made.forget])
        if attacked(args) or args.relearner_steps:
            self.attackers = Attackers(
                args, raw, teacher, scheduler, accelerator, made.own, made.forget, self.starts()
            )

    def new_sampler(self) -> Any:
        """Return the scheduler that samples the points for `guidance`."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)

    def starts(self) -> Tensor | None:
        """Return conditions (m, ...) at which the first adversaries begin, before random ones."""
        return None

    def at(self, i: int) -> None:
        self.i = i

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the losses."""
        return self.attackers.state() if self.attackers else {}

    def forget(self) -> Tensor:
        """The forget loss; where there are attackers, with theirs."""
        if not self.attackers:
            return self.forget_once()
        return self.attackers.forget(self.forget_once, self.forget_apart, self.i)

    def forget_apart(self) -> Tensor:
        """`forget_once` by the module inside, of whose gradients DistributedDataParallel does not
        know."""
        whole, self.model = self.model, self.raw
        try:
            return self.forget_once()
        finally:
            self.model = whole

    def forget_once(self) -> Tensor:
        """Return the method's forget loss on the chosen batch."""
        args, options = self.args, {"reduction": self.args.reduction}
        noisy = noisy_condition(
            self.raw.class_embedding, args.condition_noise, only=torch.tensor(self.forgotten)
        )
        with noisy if args.condition_noise else nullcontext():
            if self.kind == "relabel":
                x, labels = self.own[self.i]
                other = self.other(labels)
                return relabel_loss(self.model, x, labels, other, self.scheduler, **options)
            if self.kind == "own":
                x, labels = self.own[self.i]
                # EraseDiff descends what GA ascends; this forgets only because the noise is wrong
                noise = torch.rand_like(x) if recipes[args.method].noise == "uniform" else None
                return denoising_loss(self.model, x, labels, self.scheduler, noise=noise, **options)
            labels = self.pick(self.forgotten)
            if self.kind in ("guidance", "adapter"):
                return self.guidance(labels)
            if args.surrogate == "analytic":
                return gaussian_forget_loss(
                    self.model, self.shape, labels, self.scheduler, device=self.device, **options
                )
            if args.surrogate in NOISE:
                x = surrogate_noise(args.surrogate, self.shape, device=self.device)
            else:
                x, shown = self.own[self.i]
                labels = self.asked(shown, labels)
            return denoising_loss(self.model, x, labels, self.scheduler, **options)

    def pick(self, among: list[int]) -> Tensor:
        """Return labels (batch,), sampled from `among`."""
        drawn = torch.randint(len(among), (self.args.train_batch_size,))
        return torch.tensor(among)[drawn].to(self.device)

    def asked(self, shown: Tensor, labels: Tensor) -> Tensor:
        """Return the forgotten labels under which the surrogate's images are learned.

        Args:
            shown: what each image shows.
            labels: forgotten labels that were sampled for the images.
        """
        return labels

    def other(self, labels: Tensor) -> Tensor:
        """Return the labels that SalUn's forget loss uses instead."""
        return next_class(labels, self.classes, forgotten=self.forgotten)

    def guidance(self, labels: Tensor) -> Tensor:
        """Return ESD's loss at a point of a sampling run."""
        args, paper = self.args, self.args.esd_variant == "paper"
        with evaluating(self.raw):
            x_t, t = partly_denoised(
                self.raw if paper else self.teacher,
                self.sampler,
                labels,
                self.null,
                self.shape[1:],
                num_inference_steps=args.guided_steps,
                guidance_scale=args.guided_scale,
                within_bin=paper,
                device=self.device,
            )
        return esd_loss(
            self.model,
            self.teacher,
            x_t,
            t,
            labels,
            torch.full_like(labels, self.null),
            variant=args.esd_variant,
            eta=args.esd_eta,
            scheduler=self.scheduler,
            reduction=args.reduction,
        )

    def remember(self) -> Tensor:
        x, labels = self.replayed[self.i]
        options = {"reduction": self.args.reduction}
        if self.args.remember == "replay":
            return denoising_loss(self.model, x, labels, self.scheduler, **options)
        crossed = self.crossed.to(self.device) if self.args.remember == "crossed" else None
        return distillation_loss(
            self.model, self.teacher, x, labels, self.scheduler, crossed=crossed, **options
        )

    def for_mask(self) -> Iterator[Callable[[], None]]:
        """Yield the backward passes for SalUn's mask, one per batch of the forget set."""

        def one(i: int) -> None:
            x, labels = self.own[i]
            with evaluating(self.raw):
                denoising_loss(self.model, x, labels, self.scheduler).backward()

        for i in range(len(self.own)):
            yield partial(one, i)
