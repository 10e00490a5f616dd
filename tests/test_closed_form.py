"""UCE, RECE and SPEED: each against its formula in NumPy, and what each promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ebu_optim.closed_form import (
    adversarial,
    apply,
    gram,
    influential,
    invariants,
    null_space,
    rece,
    speed,
    uce,
)

D, OUT = 24, 10


def rows(n, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, D)))


def weights(n=3):
    draw = np.random.default_rng(7)
    return [torch.from_numpy(draw.standard_normal((OUT, D))) for _ in range(n)]


C, G, KEPT, NEW = rows(3, 0), rows(3, 1), rows(6, 2), rows(2, 3)


def close(a, b, **how):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), **{"rtol": 1e-9, "atol": 1e-9, **how})


# -- UCE ------------------------------------------------------------------------------------------


def uce_by_matrix(W, c, g, kept, l, e, p):  # noqa: E741
    """The formula of the paper for one weight, sum by sum."""
    top, bottom = l * W, l * np.eye(D)
    for x, y in zip(c, g, strict=True):
        top, bottom = top + e * np.outer(W @ y, x), bottom + e * np.outer(x, x)
    for x in kept:
        top, bottom = top + p * np.outer(W @ x, x), bottom + p * np.outer(x, x)
    return top @ np.linalg.inv(bottom)


def test_uce_is_its_formula_for_every_weight():
    R = uce(C, G, KEPT, ridge=0.3, erase_scale=1.4, preserve_scale=0.6)
    assert R.dtype == torch.float64
    for W in weights():
        expected = uce_by_matrix(W.numpy(), C.numpy(), G.numpy(), KEPT.numpy(), 0.3, 1.4, 0.6)
        close(W @ R, expected)


def test_uce_reads_what_is_erased_as_its_target_and_the_rest_as_before():
    R = uce(C, G[:1], KEPT, ridge=1e-7)
    close(C @ R.T, G[:1].expand(3, -1), atol=1e-5)
    close(KEPT @ R.T, KEPT, atol=1e-5)
    free = torch.linalg.svd(torch.cat([C, KEPT]), full_matrices=True).Vh[9:]
    close(free @ uce(C, G, KEPT).T, free)  # orthogonal to all: untouched at any ridge
    close(uce(C, C, KEPT), torch.eye(D))


# -- RECE -----------------------------------------------------------------------------------------


def test_rece_is_its_formula():
    ws = [w.numpy() for w in weights()]
    now = [uce_by_matrix(w, C.numpy(), G.numpy(), KEPT.numpy(), 0.5, 1, 1) for w in ws]
    for _ in range(2):
        A = 0.2 * np.eye(D) + sum(w.T @ w for w in now)
        B = sum(w.T @ old for w, old in zip(now, ws, strict=True))
        found = (np.linalg.inv(A) @ B @ C.numpy().T).T
        now = [uce_by_matrix(w, found, G.numpy(), KEPT.numpy(), 0.1, 1, 0.1) for w in now]
    R = rece(gram(weights()), C, G, KEPT, rounds=2, ridge=0.2)
    for w, expected in zip(weights(), now, strict=True):
        close(w @ R, expected, rtol=1e-7)


def test_rece_closes_what_uce_leaves_open():
    ws, target = weights(), G[:1]
    start = uce(C, target, KEPT)
    S = gram(ws)
    found = adversarial(S, start, C, ridge=1e-6)
    before = torch.stack([(w @ start @ found.T - w @ C.T).norm() for w in ws])
    assert (before < 0.01).all()  # the edited model reads them as the concept
    R = rece(S, C, target, KEPT, start=start, rounds=1, ridge=1e-6, edit_ridge=1e-6)
    for w in ws:
        close(w @ R @ found.T, (w @ start @ target.T).expand(-1, 3), atol=0.02)
        # of what is kept an edit of ridge lambda moves a little
        assert (w @ R @ KEPT.T - w @ start @ KEPT.T).norm() < 0.01 * (w @ KEPT.T).norm()


# -- SPEED ----------------------------------------------------------------------------------------


def test_speed_is_its_formula():
    W = weights(1)[0].numpy()
    t, a, kept, K = (x.numpy() for x in (C, G, KEPT, NEW.T))
    values, vectors = np.linalg.eigh(kept.T @ kept / len(kept))
    U = vectors[:, values < 0.3]
    P, T, A = U @ U.T, t.T @ t / 3, a.T @ t / 3
    M = np.linalg.inv(T @ P + 0.7 * np.eye(D))
    inner = np.linalg.inv(K.T @ P @ M @ K + 0.5 * np.eye(2))
    delta = W @ (A - T) @ P @ (np.eye(D) - M @ K @ inner @ K.T @ P) @ M
    R = speed(C, G, KEPT, NEW, threshold=0.3, ridge=0.7, damping=0.5)
    close(W @ R.numpy(), W + delta)


def test_speed_keeps_exactly_and_reads_what_is_erased_as_its_target():
    R = speed(C, G[:1], KEPT, NEW, ridge=1e-6)
    close(KEPT @ R.T, KEPT)
    close(NEW @ R.T, NEW, atol=1e-6)
    close(C @ R.T, G[:1].expand(3, -1), atol=1e-4)
    gentle = speed(C, G, KEPT, NEW, ridge=1.0)
    close(KEPT @ gentle.T, KEPT)
    close(NEW @ gentle.T, NEW)
    assert ((C @ gentle.T - G).norm(dim=1) < (C - G).norm(dim=1)).all()


def test_what_is_invariant_may_be_among_what_is_kept():
    R = speed(C, G, KEPT, torch.cat([NEW, KEPT[:2]]))
    assert R.isfinite().all()
    close(torch.cat([NEW, KEPT]) @ R.T, torch.cat([NEW, KEPT]), atol=1e-7)


def test_influential_are_those_that_a_free_edit_moves_most():
    W = weights(1)[0]
    T, A = C.T @ C / 3, G.T @ C / 3
    sizes = torch.stack(
        [(W @ (A - T) @ torch.linalg.inv(torch.eye(D) + T) @ c).norm() for c in KEPT]
    )
    close(influential(W, C, G, KEPT), KEPT[sizes > sizes.mean()])


def test_a_null_space_that_is_empty_says_so():
    assert torch.linalg.matrix_rank(null_space(KEPT)) == D - 6
    with pytest.raises(
        ValueError, match="threshold=1e-09: in all 24 directions, the kept embeddings reach"
    ):
        null_space(rows(100, 5), 1e-9)


# -- models ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width=D):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(w, OUT) for w in (4, width, width))


def model(width=D):
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.ModuleDict({"attn1": Attention(), "attn2": Attention(width)})})


def test_apply_edits_keys_and_values_and_leaves_the_bias():
    m = model()
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    R = uce(C, G, KEPT, ridge=1e-9)
    assert apply(m, R) == ["a.attn2.to_k", "a.attn2.to_v"]
    for n, p in m.named_parameters():
        assert torch.equal(p, before[n]) != n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    old = C.float()
    with torch.no_grad():
        read = m["a"]["attn2"].to_v(old)
    expected = G.float() @ before["a.attn2.to_v.weight"].T + before["a.attn2.to_v.bias"]
    torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
    assert apply(model(), R, endings=("attn2.to_v",)) == ["a.attn2.to_v"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: uce(C, G[:, :4]), "targets has embeddings of width 4, the others have 24"),
        (lambda: uce(C, G[:2]), "targets has 2 rows; give one, or one for each of 3"),
        (lambda: uce(C * torch.nan, G), "erase must be finite embeddings"),
        (lambda: uce(C, G, ridge=0.0), "ridge must be finite and > 0; got 0.0"),
        (lambda: uce(C, G, preserve_scale=-1.0), "preserve_scale must be finite and >= 0"),
        (lambda: rece(torch.eye(3), C, G), r"weights must be a matrix of 24 x 24.*\(3, 3\)"),
        (lambda: rece(torch.eye(D), C, G, rounds=0), "rounds must be >= 1; got 0"),
        (lambda: speed(C, G, KEPT, damping=-1.0), "damping must be finite"),
        (lambda: gram([]), "weights is empty"),
        (lambda: apply(model(5), torch.eye(D)), "a.attn2.to_k reads embeddings of width 5"),
        (lambda: apply(model(), torch.eye(D), ("x",)), "no linear layer whose name ends in x"),
        (lambda: apply(model(), torch.ones(2, 3)), "edit must be a finite square matrix"),
    ],
)
def test_what_does_not_fit_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_what_speed_reads_as_before_is_the_first_token_and_centres_of_the_others():
    far = 10 * torch.eye(3, D, dtype=torch.float64)
    near = far[[0, 1, 2, 2, 1]] + 0.01 * rows(5, 3)
    found = invariants(torch.cat([rows(1, 2), near]))
    assert torch.equal(found[:1], rows(1, 2))
    centres = torch.stack([near[[0]].mean(0), near[[1, 4]].mean(0), near[[2, 3]].mean(0)])
    order = torch.cdist(found[1:], centres).argmin(0)
    torch.testing.assert_close(found[1:][order], centres)
    assert len(invariants(rows(1, 2).expand(6, D))) == 2  # padding that is the same everywhere
    with pytest.raises(ValueError, match="at least 2 tokens, and centres be >= 1; got 1 and 3"):
        invariants(rows(1, 2))
