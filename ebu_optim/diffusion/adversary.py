"""Forgetting in depth: the conditions that would bring the class back are forgotten with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._modules import evaluating
from ..distributed import alone
from .losses import denoising_loss


class Adversary:
    r"""A few embeddings that are trained, while the model forgets, to draw what it forgets.

    Forgetting under one condition leaves the class within reach of others: inversion learns an
    embedding :math:`v` against the frozen weights that brings it back. Here that attack runs beside
    the unlearning, a step of Adam for each of its own,

    .. math:: \min_v \; \| \epsilon - \epsilon_\theta(x_t, t, v) \|^2, \quad x \text{ of the class},

    and the forget loss is asked for on a share of its batch under these :math:`v` instead of the
    condition to forget. It is adversarial training against :func:`ebu_optim.metrics.inversion`, and
    not part of the paper; its evidence is in docs/results.md.

    .. code-block:: python

        adversary = Adversary(unet, unet.class_embedding, scheduler)
        for x_own, ... in loader:
            adversary.attack(x_own)
            with opt.forget(), adversary.applied():
                denoising_loss(unet, noise, labels, scheduler).backward()

    Costs a forward and a backward pass more a step, and no gradient of a weight. Under
    torch.distributed the attack's gradients are averaged, so that all ranks have the same
    embeddings; give each rank its own images.

    Args:
        model: a class-conditional model; the module itself, not DistributedDataParallel's wrapper.
        embedding: of its conditions, e.g. ``unet.class_embedding``, with ``weight`` (classes, d).
        scheduler: of the diffusion.
        count: embeddings.
        share: of the samples of a forget loss that get one of them, in (0, 1].
        lr: of the attack's Adam; 0.1 is that of :func:`~ebu_optim.metrics.inversion`.
        restart: one of the embeddings in turn begins anew after so many attacks: an old one is
            stuck where the class is gone already.
        seed: of its private draws.
    """

    def __init__(
        self, model: nn.Module, embedding: nn.Embedding, scheduler: Any, *, count: int = 4,
        share: float = 0.06, lr: float = 0.1, restart: int = 50, seed: int = 0,
    ) -> None:  # fmt: skip
        if count < 1 or restart < 1:
            raise ValueError(f"count and restart must be >= 1; got {count} and {restart}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1]; got {share}")
        if not lr > 0:
            raise ValueError(f"lr must be > 0; got {lr}")
        weight = getattr(embedding, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(
                "embedding must have a weight of shape (classes, d), e.g. unet.class_embedding; "
                f"got {type(embedding).__name__}"
            )
        self.model, self.embedding, self.scheduler = model, embedding, scheduler
        self.count, self.share, self.lr, self.restart = count, share, lr, restart
        self.attacks = 0
        self._draws = torch.Generator().manual_seed(seed)
        self.vectors = torch.stack([self._fresh() for _ in range(count)])
        # Adam's, by hand: an embedding that begins anew leaves the state of the others alone
        self._mean, self._square = torch.zeros_like(self.vectors), torch.zeros_like(self.vectors)
        self._age = torch.zeros(count, 1)

    def _fresh(self) -> Tensor:
        """The mean of the rows, where inversion begins, and up to their spread around it."""
        weight = self.embedding.weight.detach().float().cpu()
        width = torch.rand((), generator=self._draws) * weight.std()
        return weight.mean(dim=0) + width * torch.randn(weight.shape[1], generator=self._draws)

    def attack(self, images: Tensor) -> Tensor:
        """A step of all embeddings on images (n, C, H, W) of the class to forget, n >= count.

        The model is evaluated in eval mode; its gradients and its mode are untouched.

        Returns:
            The loss, a scalar, mean over C, H, W.
        """
        if images.dim() != 4 or len(images) < self.count:
            raise ValueError(
                f"images must have shape (n, C, H, W) with n >= {self.count}, the embeddings; got "
                f"{tuple(images.shape)}"
            )
        if self.attacks and self.attacks % self.restart == 0:
            i = self.attacks // self.restart % self.count
            self.vectors[i] = self._fresh()
            for state in (self._mean, self._square, self._age):
                state[i] = 0
        self.attacks += 1
        vectors = self.vectors.to(images.device, copy=True).requires_grad_()
        which = torch.arange(len(images), device=images.device) % self.count
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with (
            torch.enable_grad(), evaluating(self.model),
            self._replaced(lambda output: vectors[which].to(output)),
        ):  # fmt: skip
            loss = denoising_loss(
                self.model, images, labels, self.scheduler, reduction="mean",
                generator=self._draws,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, vectors)
        if not alone():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        gradient = gradient.float().cpu()
        self._age += 1
        self._mean.lerp_(gradient, 0.1)
        self._square.lerp_(gradient.square(), 0.001)
        step = (self._mean / (1 - 0.9**self._age)) / (
            (self._square / (1 - 0.999**self._age)).sqrt() + 1e-8
        )
        self.vectors -= self.lr * step
        return loss.detach()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block each sample is, with probability `share`, given one of the embeddings
        instead of its own condition."""

        def swap(output: Tensor) -> Tensor:
            n = len(output)
            rows = torch.rand(n, generator=self._draws) < self.share
            pick = torch.randint(self.count, (n,), generator=self._draws)
            chosen = self.vectors[pick].to(output)
            return torch.where(rows.to(output.device)[:, None], chosen, output)

        with self._replaced(swap):
            yield

    @contextmanager
    def _replaced(self, change: Any) -> Iterator[None]:
        handle = self.embedding.register_forward_hook(lambda _module, _args, out: change(out))
        try:
            yield
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "vectors": self.vectors.clone(), "mean": self._mean.clone(),
            "square": self._square.clone(), "age": self._age.clone(), "attacks": self.attacks,
            "draws": self._draws.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state has other embeddings; nothing is changed then."""
        if state["vectors"].shape != self.vectors.shape:
            raise ValueError(
                f"state has embeddings of shape {tuple(state['vectors'].shape)}, this adversary "
                f"{tuple(self.vectors.shape)}: build it with the same count and model"
            )
        self.vectors, self._mean = state["vectors"].clone(), state["mean"].clone()
        self._square, self._age = state["square"].clone(), state["age"].clone()
        self.attacks = int(state["attacks"])
        self._draws.set_state(state["draws"])
