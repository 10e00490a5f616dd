"""UCE: a ridge regression from the present to the wanted keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ._embeddings import number, pairs, rows


def uce(
    erase: Tensor,
    targets: Tensor,
    preserve: Tensor | None = None,
    *,
    ridge: float = 0.5,
    erase_scale: float = 1.0,
    preserve_scale: float = 1.0,
) -> Tensor:
    r"""Unified Concept Editing (Gandikota et al., 2024).

    W' = W R minimises
    :math:`e \sum_i |W' c_i - W g_i|^2 + p \sum_j |W' c_j - W c_j|^2 + \lambda |W' - W|^2`:

    .. math:: R = \Big(\lambda I + e \sum_i g_i c_i^T + p \sum_j c_j c_j^T\Big)
              \Big(\lambda I + e \sum_i c_i c_i^T + p \sum_j c_j c_j^T\Big)^{-1}

    Args:
        erase: the embeddings c_i, [n, d]; the published code uses only the concept's last token.
        targets: g_i, how c_i are to be read, [n, d] or [1, d].
        preserve: the embeddings c_j, [m, d], or None.
        ridge: lambda > 0.
        erase_scale, preserve_scale: e and p, >= 0.

    Returns:
        R, float64 [d, d], on the device of `erase`.

    Raises:
        ValueError: embeddings do not fit, or a number is out of range.
    """
    c, g = pairs(erase, targets)
    e, p = number("erase_scale", erase_scale), number("preserve_scale", preserve_scale)
    eye = torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    reached = number("ridge", ridge, strictly=True) * eye + e * c.T @ c
    if preserve is not None:
        held = rows("preserve", preserve, c.shape[1]).to(c)
        reached = reached + p * held.T @ held
    # only R - I is solved for, so directions that no embedding reaches have no rounding errors
    return eye + torch.linalg.solve(reached, e * (g.to(c) - c).T @ c, left=False)
