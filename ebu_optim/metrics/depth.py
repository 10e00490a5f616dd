"""How deep the forgetting goes: two attacks on an unlearned class-conditional model.

Both need real images of the forgotten class. The attacked model is measured like any other model:
sample, classify, P_f. If a method only unhooks the condition, the first attack succeeds in a few
steps.

The attacks learn by :func:`~ebu_optim.diffusion.denoising_loss` with mean reduction. For a model of
another kind, give the loss by which it learned its images: ``loss(model, images, labels,
generator)`` takes labels (n,) int64 and the generator of all random draws, and returns a 0-d
tensor. Then `scheduler` is not used and may be None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.losses import denoising_loss
from ..modules import copied, evaluating

Loss = Callable[[Any, Tensor, Tensor, torch.Generator], Tensor]
#: Maps the learned tensors to their optimizer.
Optimized = Callable[[list[Tensor]], torch.optim.Optimizer]
#: Maps a copy of the model to the parameters that are trained; it may add layers to the copy.
Trained = Callable[[Any], Iterable[nn.Parameter]]


@contextmanager
def condition_replaced(
    embedding: nn.Module, vector: Tensor, null: int | None = None
) -> Iterator[None]:
    """Make `embedding` return `vector` (d,) for every sample in the block.

    Args:
        null: the label of the null class, which keeps its own row; None replaces every label.
    """

    def replace(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        made = vector.to(output).expand_as(output)
        return made if null is None else torch.where(args[0].unsqueeze(-1) == null, output, made)

    handle = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _real(images: Tensor, batch_size: int) -> None:
    if images.dim() != 4 or not len(images):
        raise ValueError(
            "images must have shape (n, C, H, W) with n > 0, real images of the forgotten class; "
            f"got {tuple(images.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1; got {batch_size}")


def _attack_loss(loss: Loss | None, scheduler: Any) -> Loss:
    if loss is None:
        if scheduler is None:
            raise ValueError(
                "scheduler is None; give the diffusion model's scheduler or, for a model of "
                "another kind, loss="
            )
        return lambda model, x, labels, generator: denoising_loss(
            model, x, labels, scheduler, reduction="mean", generator=generator
        )

    def checked(model: Any, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        value = loss(model, x, labels, generator)
        # if the loss did not use the new vector, inversion would look like deep forgetting
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
            raise ValueError(
                f"loss must return a 0-d tensor with a gradient; got {value!r}; take the mean over "
                "the batch, detach nothing, and let the model call its `embedding` module"
            )
        return value

    return checked


def learn_embeddings(
    model: nn.Module,
    embedding: nn.Embedding,
    images: Tensor,
    scheduler: Any,
    *,
    at: Sequence[int],
    lr: float = 0.1,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
    optimizer: Optimized | None = None,
) -> dict[int, Tensor]:
    """Run :func:`learn_embedding` for several numbers of steps, in one run of the longest.

    Args:
        at: numbers of steps, each >= 0.
        loss: for a model of another kind, see the top of this module.
        optimizer: makes the optimizer of the vector; None is Adam with `lr`.

    Returns:
        A mapping from number of steps to the (d,) vector after them, bit for bit that of a run with
        so many steps.
    """
    _real(images, batch_size)
    if not len(at) or min(at) < 0:
        raise ValueError(f"at must hold numbers of steps, each >= 0; got {list(at)}")
    attack_loss = _attack_loss(loss, scheduler)
    g = torch.Generator().manual_seed(seed)
    device = embedding.weight.device
    vector = embedding.weight.detach().float().mean(dim=0).requires_grad_()
    made = torch.optim.Adam([vector], lr=lr) if optimizer is None else optimizer([vector])
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    found: dict[int, Tensor] = {}
    try:
        with (
            evaluating(model),
            condition_replaced(embedding, vector),
            torch.enable_grad(),
        ):
            for step in range(max(at) + 1):
                if step in at:
                    found[step] = vector.detach().clone()
                if step == max(at):
                    break
                x = images[torch.randint(len(images), (batch_size,), generator=g)].to(device)
                labels = torch.zeros(batch_size, dtype=torch.long, device=device)
                made.zero_grad()
                attack_loss(model, x, labels, g).backward()
                made.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return found


def learn_embedding(
    model: nn.Module,
    embedding: nn.Embedding,
    images: Tensor,
    scheduler: Any,
    *,
    steps: int,
    lr: float = 0.1,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
) -> Tensor:
    """Inversion: learn a new class embedding on real images of the class, with frozen weights.

    It starts from the mean of the embedding's rows and uses Adam.

    Args:
        embedding: e.g. ``unet.class_embedding``.
        images: (n, C, H, W) real images of the forgotten class.
        steps: 100 and 200 are reported; :func:`learn_embeddings` gives both from one run.
        loss: for a model of another kind, see the top of this module.

    Returns:
        (d,) vector for :func:`condition_replaced`.
    """
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "loss": loss}
    return learn_embeddings(model, embedding, images, scheduler, at=(steps,), **options)[steps]


def relearning(
    model: nn.Module,
    images: Tensor,
    label: int,
    scheduler: Any,
    *,
    lr: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
    trained: Trained | None = None,
) -> Iterator[nn.Module]:
    """Yield the copy of :func:`relearn` after 0, 1, 2, ... steps, in eval mode, without an end.

    It is the same module every time: measure it, or copy it, before you ask for the next.

    Args:
        trained: returns the parameters of the copy that learn; None trains all of them.
    """
    _real(images, batch_size)
    _known(model, label)
    attack_loss = _attack_loss(loss, scheduler)
    g = torch.Generator().manual_seed(seed)
    student = copied(model).eval().requires_grad_(True)
    device = next(student.parameters()).device
    learning = student.parameters() if trained is None else trained(student)
    optimizer = torch.optim.Adam(learning, lr=lr)
    while True:
        yield student
        student.train()
        with torch.enable_grad():
            x = images[torch.randint(len(images), (batch_size,), generator=g)].to(device)
            labels = torch.full((batch_size,), label, device=device)
            optimizer.zero_grad()
            attack_loss(student, x, labels, g).backward()
            optimizer.step()
        student.eval()


def _known(model: nn.Module, label: int) -> None:
    classes = getattr(getattr(model, "config", None), "num_class_embeds", None)
    if classes is not None and not 0 <= label < classes:
        raise ValueError(f"label must be in 0..{classes - 1}, the model's classes; got {label}")


def relearn(
    model: nn.Module,
    images: Tensor,
    label: int,
    scheduler: Any,
    *,
    steps: int,
    lr: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
    loss: Loss | None = None,
) -> nn.Module:
    """Fine-tune a copy of the model on the forget set for `steps` steps of Adam.

    Args:
        images: (n, C, H, W) real images of the forgotten class.
        label: its label.
        loss: for a model of another kind, see the top of this module.

    Returns:
        The relearned copy in eval mode; the given model is not changed.
    """
    options: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "seed": seed, "loss": loss}
    run = relearning(model, images, label, scheduler, **options)
    return next(islice(run, steps, None))
