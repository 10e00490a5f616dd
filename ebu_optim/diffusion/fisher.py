"""The loss and the random draws that a DiagonalFisher needs for a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules import stream, tensor_hash
from .losses import each_loss, predict
from .sampling import scheduler_protocol
from .schedules import check_family, independent, noised, weights


class FisherBatches(Sequence[Any]):
    """Samples with their timesteps and noises; every call draws the same values again.

    Args:
        images: (n, C, H, W), e.g. a replay set.
        labels: (n,) their classes.
        scheduler: a diffusers scheduler, as for :func:`~ebu_optim.diffusion.denoising_loss`.
        timesteps: T' independent draws per sample: uniform over 0..T-1, or for flow matching as in
            :mod:`~ebu_optim.diffusion.flow`.
        cross: yield pairs of batches with T' / 2 independent draws each, for the estimate whose
            expectation does not depend on T'; `timesteps` must then be even.
        batch_size: samples per batch; memory grows with batch_size x parameters.
        seed: the seed of the draws; each batch has its own random stream.

    Items: mappings of x (m, C, H, W), labels (m,), t (m, T'), noise (m, T', C, H, W); or pairs.

    Raises:
        ValueError: `timesteps` or the number of labels is wrong; the scheduler is not supported.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        scheduler: Any,
        *,
        timesteps: int = 8,
        cross: bool = True,
        batch_size: int = 16,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if timesteps < 1 or (cross and timesteps % 2):
            raise ValueError(
                f"timesteps must be >= 1, and even with cross=True (two halves); got {timesteps}"
            )
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"there are {len(images)} images and {len(labels)} labels; give one label for each "
                "image, and at least one image"
            )
        check_family(scheduler)
        self.images, self.labels, self.scheduler = images, labels, scheduler
        self.timesteps, self.cross, self.batch_size = timesteps, cross, batch_size
        self.seed, self.device = seed, device

    @property
    def protocol(self) -> dict[str, Any]:
        """Return what identifies the samples and the draws; DiagonalFisher.estimate saves it."""
        return {
            "images": len(self.images),
            "data": tensor_hash(self.images, self.labels),
            "scheduler": scheduler_protocol(self.scheduler),
            "timesteps": self.timesteps,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        g = stream(self.seed, i)
        rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
        x, labels = self.images[rows], self.labels[rows]
        halves = 2 if self.cross else 1
        batches = []
        for _ in range(halves):
            draws = (len(x), self.timesteps // halves)
            t = independent(self.scheduler, draws, g)
            noise = torch.randn((*draws, *x.shape[1:]), generator=g, dtype=x.dtype)
            batch = {"x": x, "labels": labels, "t": t, "noise": noise}
            batches.append({k: v.to(self.device) for k, v in batch.items()})
        return tuple(batches) if self.cross else batches[0]


def fisher_loss(
    scheduler: Any, *, reduction: str = "sum"
) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
    """Return the loss for ``DiagonalFisher.estimate`` over `FisherBatches`.

    It returns (m,) values. Each is the mean over the sample's timesteps of the squared error,
    reduced over C, H, W by "sum" or "mean".
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean" over C, H, W; got {reduction!r}')

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        t, noise = batch["t"].flatten(), batch["noise"].flatten(0, 1)
        draws = batch["t"].shape[1]
        x = batch["x"].repeat_interleave(draws, 0)
        labels = batch["labels"].repeat_interleave(draws, 0)
        x_t, target = noised(scheduler, x, noise, t)
        error = predict(model, x_t, t, labels, scheduler) - target
        return each_loss(error, reduction, weights(scheduler, t)).view(-1, draws).mean(1)

    loss.protocol = {"reduction": reduction}  # type: ignore[attr-defined]
    return loss
