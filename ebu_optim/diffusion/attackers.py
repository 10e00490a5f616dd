"""The attackers of a run while it forgets, as its options say: adversaries and a relearner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..modules import evaluating, stream
from ..training.adversary import attacked, new_adversary
from ..training.data import to_float
from ..training.relearner import new_relearner
from .adversary import Adversary
from .losses import denoising_loss, distillation_loss
from .relearner import Relearner


class Attackers:
    """What they descend, and the forget loss at what they find.

    Args:
        raw: the model itself, whose passes are under autocast where the run's are.
        teacher: the frozen base model, where adversaries learn by it.
        pictures: images and labels of what is forgotten.
        forgotten: the labels that are forgotten; those without an image are never attacked.
        starts: conditions at which adversaries begin, or None.
    """

    adversary: Adversary | None = None
    relearner: Relearner | None = None

    def __init__(
        self,
        args: Any,
        raw: Any,
        teacher: Any,
        scheduler: Any,
        accelerator: Any,
        pictures: tuple[Tensor, Tensor],
        forgotten: Sequence[int],
        starts: Tensor | None,
    ) -> None:
        self.args, self.raw, self.teacher, self.scheduler = args, raw, teacher, scheduler
        self.accelerator, self.pictures = accelerator, pictures
        aims = pictures[1].unique().tolist()
        if attacked(args):
            self.adversary = new_adversary(args, raw.class_embedding, forgotten, aims, starts)
        if args.relearner_steps:
            self.relearner = new_relearner(args, raw.parameters())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; a relearner has no state."""
        return {"adversary": self.adversary} if self.adversary else {}

    def forget(self, once: Callable[[], Tensor], apart: Callable[[], Tensor], i: int) -> Tensor:
        """The forget loss of the i-th micro-batch with that of the attackers.

        Args:
            once: the forget loss.
            apart: the same by `raw`, without what the accelerator put round it.
        """
        # first: no other pass has its activations then
        moved = self._relearned(apart, i) if self.relearner else None
        if self.adversary and i % self.accelerator.gradient_accumulation_steps == 0:
            self.adversary.step(self.attack)
        loss = once()
        if self.adversary:
            weight = self.args.adversary_weight / len(self.adversary)
            for k in range(len(self.adversary)):
                with self.adversary.at(k):
                    loss = loss + weight * once()
        return loss if moved is None else loss + moved

    def attack(self, label: int, generator: torch.Generator) -> Tensor:
        """What an adversary descends. A sum over C, H, W, whatever --reduction is: Adam does not
        feel a factor, and gradients in 16 bits do not vanish."""
        images, labels = self.pictures
        of = images[labels == label], labels[labels == label]
        if self.args.adversary_loss != "teacher":
            return self._drawing(of, generator)
        x, labels = self._batch(of, generator)
        with evaluating(self.raw):
            return distillation_loss(
                self.raw, self.teacher, x, labels, self.scheduler, generator=generator
            )

    def _relearned(self, loss: Callable[[], Tensor], i: int) -> Tensor:
        """The relearner's share of the forget loss. What it samples is a function of the seed, the
        micro-batch and the process, as an adversary's is."""
        assert self.relearner is not None
        args, accelerator, scaler = self.args, self.accelerator, self.accelerator.scaler
        # 2**32: other draws than an adversary's
        number = i * accelerator.num_processes + accelerator.process_index
        generator = stream(args.seed + 2**32, number)
        return args.relearner_weight * self.relearner.loss(
            loss,
            partial(self._drawing, self.pictures, generator),
            scale=scaler.get_scale() if scaler else 1.0,
        )

    def _drawing(self, of: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        x, labels = self._batch(of, generator)
        with evaluating(self.raw):
            return denoising_loss(self.raw, x, labels, self.scheduler, generator=generator)

    def _batch(
        self, of: tuple[Tensor, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = of
        rows = torch.randint(len(images), (self.args.train_batch_size,), generator=generator)
        x = to_float(images[rows]) if images.dtype == torch.uint8 else images[rows]
        return x.to(self.accelerator.device), labels[rows].to(self.accelerator.device)
