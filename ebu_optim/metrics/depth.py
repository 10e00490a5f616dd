"""How deep the forgetting goes: two attacks on an unlearned class-conditional diffusion model.

Both need real images of the forgotten class. What they give back is measured like any other model:
sample, classify, P_f. A method that only unhooks the condition falls to the first in a few steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import evaluating
from ..diffusion.losses import denoising_loss


@contextmanager
def condition_replaced(embedding: nn.Module, vector: Tensor) -> Iterator[None]:
    """Inside the block `embedding` returns `vector` (d,) for every sample, whatever its label."""
    handle = embedding.register_forward_hook(
        lambda _module, _args, output: vector.to(output).expand_as(output)
    )
    try:
        yield
    finally:
        handle.remove()


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
) -> Tensor:
    """Inversion: learn a new class embedding on real images of the class, weights frozen.

    Starts from the mean of the embedding's rows; Adam; denoising loss with mean reduction.

    Args:
        embedding: e.g. ``unet.class_embedding``.
        images: (n, C, H, W) real images of the forgotten class.
        steps: 100 and 200 are reported.

    Returns:
        (d,) vector for :func:`condition_replaced`.
    """
    g = torch.Generator().manual_seed(seed)
    device = embedding.weight.device
    vector = embedding.weight.detach().float().mean(dim=0).requires_grad_()
    optimizer = torch.optim.Adam([vector], lr=lr)
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        with (
            evaluating(model),
            condition_replaced(embedding, vector),
            torch.enable_grad(),
        ):
            for _ in range(steps):
                x = images[torch.randint(len(images), (batch_size,), generator=g)].to(device)
                labels = torch.zeros(batch_size, dtype=torch.long, device=device)
                optimizer.zero_grad()
                denoising_loss(
                    model, x, labels, scheduler, reduction="mean", generator=g
                ).backward()
                optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return vector.detach()


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
) -> nn.Module:
    """Fine-tune a copy of the model on the forget set for `steps` steps of Adam.

    Args:
        images: (n, C, H, W) real images of the forgotten class.
        label: its label.

    Returns:
        The relearned copy in eval mode; the given model is untouched.
    """
    g = torch.Generator().manual_seed(seed)
    student = copy.deepcopy(model).train().requires_grad_(True)
    device = next(student.parameters()).device
    optimizer = torch.optim.Adam(student.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            x = images[torch.randint(len(images), (batch_size,), generator=g)].to(device)
            labels = torch.full((batch_size,), label, device=device)
            optimizer.zero_grad()
            denoising_loss(student, x, labels, scheduler, reduction="mean", generator=g).backward()
            optimizer.step()
    return student.eval()
