"""SPM's anchor loss with its random anchors, and the strength of its adapters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules import without_gradients
from .losses import Model, predict, randn, reduce_loss


def random_anchors(
    embedding: Tensor, n: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Return random text embeddings with the norm of the target times U(0.8, 1.2).

    A random Gaussian direction over all scalars is accepted with probability 1 - cos(., target).
    With 77 x 768 scalars it is almost orthogonal to any target, so almost all directions are
    accepted, and the anchors are noise.

    Args:
        embedding: (L, D) of the prompt to erase, or one of its conditions of any shape.

    Returns:
        (n, L, D) in the dtype and on the device of `embedding`.
    """
    target = embedding.flatten().float()
    norm = target.norm()
    found: list[Tensor] = []
    while len(found) < n:
        a = randn(target.shape, generator, target)
        a = a / a.norm()
        accept, scale = _uniform(2, generator, target)
        if accept <= 1 - a @ (target / norm):
            found.append(a * norm * (0.8 + 0.4 * scale))
    return torch.stack(found).view(n, *embedding.shape).to(embedding)


def _uniform(n: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.rand(n, generator=generator, device=device).to(like)


def anchor_loss(
    model: Model,
    teacher: Model,
    x_t: Tensor,
    t: Tensor,
    anchors: Tensor | Mapping[str, Tensor],
    *,
    scheduler: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the squared distance of the model from the frozen one under the anchors' conditions.

    Args:
        model, teacher: called as ``model(x_t, t, encoder_hidden_states=anchors)``.
        x_t, t: (1, C, H, W) and (1,), the same for all anchors, or n rows.
        anchors: (n, L, D) from :func:`random_anchors`. For a model with several conditions, such
            as SDXL, a mapping of its keyword arguments with n rows each.
        scheduler: only needed for a model that also predicts a variance.

    Returns:
        0-d float32 loss.
    """
    condition = {"encoder_hidden_states": anchors} if isinstance(anchors, Tensor) else anchors
    n = len(next(iter(condition.values())))
    x_t, t = x_t.expand(n, *x_t.shape[1:]), t.expand(n)
    with without_gradients():
        target = predict(teacher, x_t, t, condition, scheduler)
    return reduce_loss(predict(model, x_t, t, condition, scheduler) - target, reduction)


def transport(
    embedding: Tensor, tokens: Collection[int], erased: Sequence[tuple[Tensor, Collection[int]]]
) -> list[float]:
    r"""Facilitated transport: return how strongly each adapter acts on a prompt.

    .. math:: m_i = \max\bigl(\cos(e, e_i),\; |P \cap E_i| / |E_i|\bigr), \qquad
              W = W_0 + \sum_i m_i\, (\mathrm{up}_i\, \mathrm{down}_i)

    The released code scales both up and down by m and adds them over the concepts before it
    multiplies, so it acts with m^2 and with cross terms between the concepts. diffusers'
    ``set_adapters(names, m)`` follows the formula.

    Args:
        embedding: e, (L, D), of the prompt.
        tokens: P, the tokens of the prompt without begin, end and padding.
        erased: e_i and E_i, the same for the prompt that each adapter erases.

    Returns:
        m_i for each adapter, in [0, 1].

    Raises:
        ValueError: an erased prompt has no tokens.
    """
    found = []
    for other, words in erased:
        if not set(words):
            raise ValueError(
                "transport: an erased prompt has no tokens, so its overlap is 0 / 0; leave it out"
            )
        cos = torch.cosine_similarity(embedding.flatten().float(), other.flatten().float(), dim=0)
        share = len(set(tokens) & set(words)) / len(set(words))
        found.append(min(1.0, max(float(cos), share)))
    return found
