"""SPEED: an edit in the null space of the embeddings that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ._embeddings import number, pairs, rows


def null_space(retain: Tensor, threshold: float = 0.1) -> Tensor:
    """Return the projection P = U U^T on the directions that the kept embeddings hardly reach.

    Args:
        retain: the kept embeddings, [m, d].
        threshold: U are the eigenvectors of the mean of c c^T with eigenvalues below it, > 0.

    Returns:
        P, float64 [d, d].

    Raises:
        ValueError: every direction is reached, so that no edit would be left.
    """
    c = rows("retain", retain)
    values, vectors = torch.linalg.eigh(c.T @ c / len(c))
    free = vectors[:, values < number("threshold", threshold, strictly=True)]
    if free.shape[1] == 0:
        raise ValueError(
            f"threshold={threshold!r}: in all {c.shape[1]} directions, the kept embeddings reach "
            f"further than this; the least eigenvalue is {values[0].item():.3g}. Give a "
            "larger threshold, or fewer embeddings (see influential)"
        )
    return free @ free.T


def speed(
    erase: Tensor,
    targets: Tensor,
    retain: Tensor,
    invariant: Tensor | None = None,
    *,
    threshold: float = 0.1,
    ridge: float = 1.0,
    damping: float = 0.0,
) -> Tensor:
    r"""SPEED (Li et al., 2025), W' = W R with

    .. math:: R = I + (A - T)\, P\, \big[I - M K (K^T P M K + \lambda I)^{-1} K^T P\big]\, M, \qquad
              M = (T P + s I)^{-1}

    where T is the mean of t t^T over the erased embeddings, A is the mean of a t^T with their
    targets a, P comes from `null_space`, and K are embeddings that are read exactly as before
    (:math:`\lambda = 0`). Embeddings in the complement of P are read exactly as before, too.

    Args:
        erase: t, [n, d].
        targets: a, [n, d] or [1, d].
        retain: the kept embeddings, [m, d]; all of them, or those of `influential`.
        invariant: K, [k, d], or None; in the published code those of `invariants`.
        threshold: for `null_space`: 0.1, and 1e-4 for celebrities.
        ridge: s > 0: 1; 0.05 for celebrities, 0.7 for nudity.
        damping: lambda >= 0: 0; 0.5 for nudity.

    Returns:
        R, float64 [d, d]. The published code applies it only to the values.

    Raises:
        ValueError: embeddings do not fit, a number is out of range, or the null space is empty.
    """
    t, a = pairs(erase, targets)
    d = t.shape[1]
    eye = torch.eye(d, dtype=t.dtype, device=t.device)
    second, cross = t.T @ t / len(t), a.to(t).T @ t / len(t)
    projection = null_space(rows("retain", retain, d).to(t), threshold)
    inverse = torch.linalg.inv(second @ projection + number("ridge", ridge, strictly=True) * eye)
    left = eye
    damping = number("damping", damping)
    if invariant is not None:
        k = rows("invariant", invariant, d).to(t).T
        inner = k.T @ projection @ inverse @ k
        # symmetric; singular if K lies partly in the complement of P, which P already protects
        inner = (inner + inner.T) / 2 + damping * torch.eye(k.shape[1]).to(inner)
        left = eye - inverse @ k @ torch.linalg.pinv(inner, hermitian=True) @ k.T @ projection
    # the last P only removes rounding errors, which a small s would amplify in what is kept
    return eye + (cross - second) @ projection @ left @ inverse @ projection


def invariants(empty: Tensor, centres: int = 3) -> Tensor:
    """Return what SPEED reads exactly as before: of the empty prompt the first token, and the
    k-means centres of the others.

    The clustering starts at the tokens that are farthest apart, so that nothing in it is random.

    Args:
        empty: the empty prompt's tokens, [L, d] with L >= 2.
        centres: >= 1; at most the number of different tokens are returned.

    Returns:
        K, float64 [1 + centres, d].

    Raises:
        ValueError: there are fewer than two tokens, or centres < 1.
    """
    first, others = (c := rows("empty", empty))[:1], c[1:]
    if not len(others) or centres < 1:
        raise ValueError(
            f"empty must have at least 2 tokens, and centres be >= 1; got {len(c)} and {centres!r}"
        )
    found = others[:1]
    while len(found) < centres:
        away = torch.cdist(others, found).amin(1)
        if not away.any():
            break
        found = torch.cat([found, others[away.argmax()][None]])
    before = None
    while before is None or not torch.equal(found, before):  # each round lowers the sum of squares
        nearest, before = torch.cdist(others, found).argmin(1), found
        found = torch.stack([others[nearest == i].mean(0) for i in nearest.unique()])
    return torch.cat([first, found])


def influential(weight: Tensor, erase: Tensor, targets: Tensor, retain: Tensor) -> Tensor:
    r"""Return the kept embeddings that an unconstrained edit of this layer moves most.

    These are the embeddings with :math:`|W (A - T) (I + T)^{-1} c|` above the mean. If fewer
    embeddings are kept exactly, more of the null space is left.

    Args:
        weight: W, [d_out, d].
        erase, targets, retain: as for `speed`.

    Returns:
        The chosen rows of `retain`, float64 [m', d].
    """
    t, a = pairs(erase, targets)
    c = rows("retain", retain, t.shape[1]).to(t)
    second, cross = t.T @ t / len(t), a.to(t).T @ t / len(t)
    eye = torch.eye(t.shape[1], dtype=t.dtype, device=t.device)
    moved = weight.detach().to(t) @ (cross - second) @ torch.linalg.solve(eye + second, c.T)
    sizes = moved.norm(dim=0)
    return c[sizes > sizes.mean()]
