"""The forget and remember losses of unlearn.py: those of class-conditional models, on numbered
prompts, and those of SPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion import anchor_loss, esd_loss, evaluating, partly_denoised, random_anchors
from ..diffusion.objectives import Objectives
from .prompts import Prompts

ANCHORS = 4  # random embeddings of SPM in each step


class TextObjectives(Objectives):
    """The objectives of class-conditional models, for text-to-image models.

    In addition to their arguments, `prompts` says which prompt plays which part, and `raw` is a
    `modules.Prompted`."""

    def __init__(
        self,
        args: Any,
        prompts: Prompts,
        made: Any,
        model: Any,
        raw: Any,
        teacher: Any,
        scheduler: Any,
        accelerator: Any,
        shape: Sequence[int],
    ) -> None:
        self.prompts = prompts
        super().__init__(args, made, model, raw, teacher, scheduler, accelerator, shape)
        self.null = prompts.null
        self.crossed = torch.tensor(prompts.remember)

    def starts(self) -> Tensor | None:
        given = list(self.prompts.attacks)
        return self.raw.class_embedding.weight[given] if given else None

    def new_sampler(self) -> Any:
        return self.raw.family.sampler(self.scheduler)

    def other(self, labels: Tensor) -> Tensor:
        return torch.cat([self.pick(self.prompts.instead[i])[:1] for i in labels.tolist()])

    def asked(self, shown: Tensor, labels: Tensor) -> Tensor:
        if not self.args.surrogate_concept or self.args.surrogate != "prompt":
            return labels
        forgotten = {
            s: [f for f, others in self.prompts.instead.items() if s in others]
            for s in shown.unique().tolist()
        }
        return torch.cat([self.pick(forgotten[s])[:1] for s in shown.tolist()])

    def guidance(self, labels: Tensor) -> Tensor:
        if self.kind != "adapter":
            return super().guidance(labels)
        args = self.args
        with evaluating(self.raw):
            self.x_t, self.t = partly_denoised(
                self.raw,
                self.sampler,
                labels,
                self.null,
                self.shape[1:],
                num_inference_steps=args.guided_steps,
                guidance_scale=args.guided_scale,
                earliest=1,
                device=self.device,
            )
        self.erased = labels[:1]
        return esd_loss(
            self.model,
            self.teacher,
            self.x_t,
            self.t,
            labels,
            torch.full_like(labels, self.null),
            eta=args.esd_eta,
            reduction=args.reduction,
        )

    def remember(self) -> Tensor:
        if self.kind != "adapter":
            return super().remember()
        erased = self.raw.condition(self.erased)
        anchors = {name: random_anchors(t[0], ANCHORS) for name, t in erased.items()}
        # at the first of the points at which the forget loss was just computed
        return anchor_loss(
            self.model,
            self.teacher,
            self.x_t[:1],
            self.t[:1],
            anchors,
            reduction=self.args.reduction,
        )
