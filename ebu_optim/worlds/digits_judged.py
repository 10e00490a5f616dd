"""Measure generated digits with the two classifiers on the axes forgotten, kept and deep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..diffusion import next_class, sample, surrogate_noise
from ..metrics import accuracy, classify, entropy, probability
from ..metrics.depth import condition_replaced, learn_embedding, relearn
from . import digits

PER_CLASS = 50  # images of each class on which before and after are measured


class Evaluation:
    """Generates images with fixed seeds and measures them with the two classifiers."""

    def __init__(self, forget: int, device: str) -> None:
        self.forget, self.device = forget, device
        found = next_class(torch.tensor([forget]), len(digits.CLASSES), forgotten=[forget])
        self.next = int(found)  # the digit that takes its place when it is relabelled
        self.plain, self.reject = digits.load_classifiers(device)
        self.ddim = DDIMScheduler.from_config(digits.scheduler().config)

    def draw(self, model: Any, labels: Tensor, seed: int, steps: int = 20) -> Tensor:
        images = sample(
            model.eval(),
            self.ddim,
            labels,
            digits.SHAPE,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            device=self.device,
        )
        return images.cpu()

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Figures of the ten-class classifier; ``..._reject``: of that with a reject class."""
        f = labels == self.forget
        plain, reject = classify(self.plain, images), classify(self.reject, images)
        return {
            "ce_f": entropy(plain[f]),
            "ce_r": entropy(plain[~f]),
            "p_f_reject": probability(reject[f], self.forget),
            "p_f": probability(plain[f], self.forget),
            "p_next_reject": probability(reject[f], self.next),
            "ra_reject": accuracy(reject[~f], labels[~f]),
            "ra": accuracy(plain[~f], labels[~f]),
            "ua_reject": 1 - accuracy(reject[f], labels[f]),
        }

    def noise(self, n: int = 2000) -> dict[str, float]:
        """The figures of uniform noise, which are the limits of forgetting into noise."""
        x = surrogate_noise(
            "uniform", (n, *digits.SHAPE), generator=torch.Generator().manual_seed(0)
        )
        plain, reject = classify(self.plain, x), classify(self.reject, x)
        return {
            "ce_f": entropy(plain),
            "p_f_reject": probability(reject, self.forget),
            "p_f": probability(plain, self.forget),
            "p_next_reject": probability(reject, self.next),
        }

    def depth(self, model: Any) -> dict[str, float]:
        """P_f (reject class) after an embedding learned in 100 steps, and after 10 steps of
        relearning."""
        x, y, _, _ = digits.images()
        real, scheduler = x[y == self.forget], digits.scheduler()
        labels = torch.full((PER_CLASS,), self.forget)
        vector = learn_embedding(model, model.class_embedding, real, scheduler, steps=100)
        with condition_replaced(model.class_embedding, vector):
            inverted = classify(self.reject, self.draw(model, labels, seed=3))
        again = relearn(model, real, self.forget, scheduler, steps=10)
        relearned = classify(self.reject, self.draw(again, labels, seed=3))
        return {
            "inversion_100": probability(inverted, self.forget),
            "relearn_10": probability(relearned, self.forget),
        }
