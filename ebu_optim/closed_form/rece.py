"""RECE: finds what an edited model still reads as the concept, and edits that too."""

from __future__ import annotations

import torch
from torch import Tensor

from ._embeddings import number, pairs, rows
from .uce import uce


def adversarial(weights: Tensor, edit: Tensor, concept: Tensor, *, ridge: float = 0.1) -> Tensor:
    r"""Return embeddings that the edited W_i R read as the original W_i read the concept:

    .. math:: c' = \Big(\lambda I + \sum_i W_i'^T W_i'\Big)^{-1} \sum_i W_i'^T W_i\, c

    Args:
        weights: the sum of W_i^T W_i of the original weights, from `gram`, [d, d].
        edit: R, [d, d].
        concept: the embeddings c, [n, d].
        ridge: lambda > 0.

    Returns:
        c', float64 [n, d].
    """
    s, r = weights.double(), edit.double()
    c = rows("concept", concept, len(r)).to(r)
    eye = number("ridge", ridge, strictly=True) * torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve(eye + r.T @ s @ r, r.T @ s @ c.T).T


def rece(
    weights: Tensor,
    erase: Tensor,
    targets: Tensor,
    preserve: Tensor | None = None,
    *,
    start: Tensor | None = None,
    rounds: int = 3,
    ridge: float = 0.1,
    edit_ridge: float = 0.1,
    erase_scale: float = 1.0,
    preserve_scale: float = 0.1,
) -> Tensor:
    """RECE (Gong et al., 2024): rounds of `adversarial` and `uce` after an edit.

    Every round finds the embeddings that the edited weights read as the concept, and edits these
    to the targets too. One R serves all weights: each round multiplies it by the next edit.

    Args:
        weights: the sum of W^T W over all keys and values, from `gram`, [d, d].
        erase: the concept's embeddings, [n, d]; the published code uses all 77 tokens.
        targets: [n, d] or [1, d]; the embedding of " " in the published code.
        preserve: [m, d] or None.
        start: the first edit, [d, d]; None makes it by `uce` with the defaults of `uce`.
        rounds: >= 1; published: 3 for nudity, 2 for unsafe images, 1 for styles and objects.
        ridge: for `adversarial`, > 0; published: 0.1, and 1e-3 for styles and objects.
        edit_ridge, erase_scale, preserve_scale: for the edits in the rounds.

    Returns:
        R, float64 [d, d].

    Raises:
        ValueError: embeddings or matrices do not fit, or a number is out of range.
    """
    c, g = pairs(erase, targets)
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1; got {rounds!r}")
    for name, matrix in (("weights", weights), ("start", start)):
        if matrix is not None and matrix.shape != (c.shape[1],) * 2:
            raise ValueError(
                f"{name} must be a matrix of {c.shape[1]} x {c.shape[1]}, the width of the "
                f"embeddings; got shape {tuple(matrix.shape)}"
            )
    edit = uce(c, g, preserve) if start is None else start.detach().to(c)
    weights = weights.detach().to(c)
    for _ in range(rounds):
        found = adversarial(weights, edit, c, ridge=ridge)
        edit = edit @ uce(
            found,
            g,
            preserve,
            ridge=edit_ridge,
            erase_scale=erase_scale,
            preserve_scale=preserve_scale,
        )
    return edit
