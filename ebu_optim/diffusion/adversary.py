"""Adversarial embeddings: an adversary learns conditions that still generate what is forgotten.

    adversary = Adversary(unet.class_embedding, [forgotten])
    for batch in loader:
        adversary.step(attack)  # a few steps of Adam on the embedding, the weights as they are
        with opt.forget():
            loss = forget_loss(batch)
            with adversary.at():
                loss = loss + forget_loss(batch)
            loss.backward()

An embedding is whatever module gives the model its condition as rows (n, D): a UNet's
``class_embedding``, or the table of text embeddings of `text_to_image.modules.Prompted`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..modules import stream

#: (A forgotten label, the generator of all that is sampled) -> 0-d loss, small where the label's
#: images are generated.
Attack = Callable[[int, torch.Generator], Tensor]


class Adversary:
    r"""Embeddings that learn to generate what is being forgotten.

    Each begins at a point of its own, sampled with the mean and the spread of the embedding's rows.
    At every call of `step` it takes `steps` steps of Adam down the attack's loss, and after
    `restart` calls it begins anew; several are restarted in turn. Of several forgotten labels each
    adversary aims at the next one with every restart.

    All draws are functions of the seed and of the number of the call, so that nobody's random
    stream is touched and a resumed run is the same run. Of several processes each attacks with
    images and noise of its own, and the gradients are averaged: the embeddings are the same
    everywhere. `step` must then be called by all of them.

    Args:
        embedding: with a `weight` (rows, D); its output for a label is replaced by the adversary's.
        forgotten: the labels whose conditions are replaced; all others keep theirs.
        steps: of Adam, in each call of `step`.
        restart: calls until an adversary begins anew.
        count: adversaries at once.
        lr: of Adam, times the spread of the embedding's weights.
        seed: of the starts and of what the attacks sample.
        start: (m, ...) embeddings to begin at, such as those of attacks that won, taken in turn in
            the place of the first m random draws.
        aims: the labels that are attacked, if images of others are lacking; None: all labels.

    Raises:
        ValueError: a number that cannot be; no forgotten label; starts of another width.
    """

    def __init__(
        self,
        embedding: nn.Module,
        forgotten: Sequence[int],
        *,
        steps: int = 3,
        restart: int = 20,
        count: int = 1,
        lr: float = 0.1,
        seed: int = 0,
        start: Tensor | None = None,
        aims: Sequence[int] | None = None,
    ) -> None:
        for name, value in (("steps", steps), ("restart", restart), ("count", count)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite; got {lr}")
        if not len(forgotten) or (aims is not None and not len(aims)):
            raise ValueError("forgotten or aims names no label: there is nothing to attack")
        weight = getattr(embedding, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"embedding must have a weight (rows, D); got {embedding!r}")
        width = weight.shape[1]
        if start is not None and (start.dim() < 2 or start[0].numel() != width):
            raise ValueError(
                f"start must have rows of {width} numbers, as the embedding; got shape "
                f"{tuple(start.shape)}"
            )
        self.embedding, self.forgotten = embedding, list(forgotten)
        self.aims = list(forgotten if aims is None else aims)
        self.steps, self.restart, self.seed = steps, restart, seed
        self.start = None if start is None else start.detach().float().flatten(1).cpu()
        self.vectors = [weight.new_zeros(width, dtype=torch.float32) for _ in range(count)]
        for vector in self.vectors:
            vector.requires_grad_()
        # a rate that suits every embedding, whatever its scale
        self.optimizer = torch.optim.Adam(self.vectors, lr=lr * float(weight.detach().std()))
        self.taken = 0

    def __len__(self) -> int:
        return len(self.vectors)

    def step(self, attack: Attack) -> None:
        """Some steps of Adam of each adversary.

        Args:
            attack: called as ``attack(label, generator)``, with the adversary's condition in the
                place of the label's.

        Raises:
            ValueError: an attack whose loss does not depend on the embedding.
        """
        for k in range(len(self)):
            if self.taken == 0 or (self.taken + self._ahead(k)) % self.restart == 0:
                self._begin(k)
        for i in range(self.steps):
            for k, vector in enumerate(self.vectors):
                number = (self.taken * self.steps + i) * len(self) + k
                vector.grad = self._gradient(attack, k, number)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    @contextmanager
    def at(self, k: int = 0) -> Iterator[None]:
        """Inside the block a pass that computes gradients has the k-th adversary's condition where
        a forgotten label is asked for. A pass without gradients has the label's own: it makes a
        target."""
        with self._in_place(self.vectors[k].detach()):
            yield

    def aim(self, k: int) -> int:
        """The label that the k-th adversary attacks now, or will at the next call of `step`."""
        return self.aims[self._number(k) % len(self.aims)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "vectors": torch.stack(self.vectors).detach(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: the state of other adversaries.
        """
        shape = (len(self), len(self.vectors[0]))
        if tuple(state["vectors"].shape) != shape:
            raise ValueError(
                f"the state has adversarial embeddings {tuple(state['vectors'].shape)}, here they "
                f"are {shape}"
            )
        with torch.no_grad():
            for vector, saved in zip(self.vectors, state["vectors"], strict=True):
                vector.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.taken = state["taken"]

    def _ahead(self, k: int) -> int:
        """Calls by which the k-th is ahead, so that some are trained whenever one begins anew."""
        return k * self.restart // len(self)

    def _number(self, k: int) -> int:
        """Of the k-th adversary's current start among all starts."""
        return (self.taken + self._ahead(k)) // self.restart * len(self) + k

    @torch.no_grad()
    def _begin(self, k: int) -> None:
        number, vector = self._number(k), self.vectors[k]
        self.optimizer.state.pop(vector, None)
        if self.start is not None and number < len(self.start):
            vector.copy_(self.start[number])
            return
        rows = self.embedding.get_parameter("weight").float()
        draw = torch.randn(vector.shape, generator=stream(2 * self.seed, number))
        vector.copy_(rows.mean(0) + rows.std(0) * draw.to(rows.device))

    def _gradient(self, attack: Attack, k: int, number: int) -> Tensor:
        """Of the attack's loss on the k-th vector, the mean over the processes."""
        joined = dist.is_available() and dist.is_initialized()
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        generator = stream(2 * self.seed + 1, number * ranks + rank)
        vector = self.vectors[k]
        with torch.enable_grad(), self._in_place(vector):
            loss = attack(self.aim(k), generator)
            found = None
            if loss.requires_grad:
                (found,) = torch.autograd.grad(loss, vector, allow_unused=True)
        if found is None:
            raise ValueError(
                "the attack's loss does not depend on the adversary's embedding: have the model "
                "call the `embedding` module, with the label that the attack is given"
            )
        # an overflow in 16 bits stands still instead of spoiling the vector until it begins anew
        found = found.nan_to_num(0.0, 0.0, 0.0)
        if ranks > 1:
            dist.all_reduce(found)
            found = found / ranks
        return found

    @contextmanager
    def _in_place(self, vector: Tensor) -> Iterator[None]:
        def put(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            asked = torch.isin(args[0], torch.tensor(self.forgotten, device=args[0].device))
            return torch.where(asked[..., None], vector.to(output), output)

        handle = self.embedding.register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()
