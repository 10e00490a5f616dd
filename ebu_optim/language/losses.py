r"""Forget losses of a language model that answers questions.

Notation: a sequence is a question x and its answer y. ``logits`` are the model's, of shape
(n, length, vocabulary); ``labels`` (n, length) hold the tokens, with -100 wherever a token is not
part of the answer, as transformers has it: position t of the logits predicts token t + 1. The
negative log-likelihood of an answer is

.. math:: \mathrm{nll}(y | x) = - \sum_t \log \pi_\theta(y_t | x, y_{<t})

and that of the frozen model nll_0. Constants are those of open-unlearning's configurations. To
forget by "I don't know" needs no loss of its own: the labels are such an answer, and the loss is
the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def answer_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each answer, summed over its tokens, in float32, and its length.

    Args:
        logits: (n, length, vocabulary), floating.
        labels: (n, length), integers; -100 is no part of the answer.

    Returns:
        nll (n,) float32, and the number of tokens (n,) of the same dtype as the labels.

    Raises:
        ValueError: shapes that do not fit, or an answer without a token.
    """
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape "
            f"{tuple(labels.shape)}: give (n, length, vocabulary) and (n, length)"
        )
    wanted = labels[:, 1:]
    lengths = (wanted != IGNORED).sum(1)
    if not lengths.all():
        raise ValueError(
            f"labels: the answer of sequence {int(lengths.argmin())} has no token: every label "
            f"but the first is {IGNORED}. Keep the tokens of the answer as labels"
        )
    each = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return each.sum(1), lengths


def ascent_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient ascent (Jang et al., 2023): :math:`-\mathrm{nll} / \mathrm{tokens}` of the batch.

    It has no lower bound: the model diverges sooner or later.

    Args:
        logits, labels: as of :func:`answer_nll`.
    """
    nll, lengths = answer_nll(logits, labels)
    return -nll.sum() / lengths.sum()


def npo_loss(logits: Tensor, labels: Tensor, reference: Tensor, *, beta: float = 0.1) -> Tensor:
    r"""Negative preference optimization (Zhang et al., 2024, arXiv 2404.05868, eq. 3):

    .. math:: \frac{2}{\beta} \, \mathbb{E} \log\left(1 +
              \left(\frac{\pi_\theta(y | x)}{\pi_{\theta_0}(y | x)}\right)^\beta\right)
              = -\frac{2}{\beta} \, \mathbb{E} \log \sigma(\beta (\mathrm{nll} - \mathrm{nll}_0))

    Gradient ascent that fades where an answer has become improbable; for beta towards 0 it is
    gradient ascent.

    Args:
        logits, labels: as of :func:`answer_nll`.
        reference: nll_0 (n,), of the frozen model; no gradient flows into it.
        beta: > 0.

    Raises:
        ValueError: beta is not > 0; a reference of another shape.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0; got {beta}")
    nll, _ = answer_nll(logits, labels)
    if reference.shape != nll.shape:
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; give the frozen model's nll of each "
            f"answer, {tuple(nll.shape)}, which is answer_nll(...)[0]"
        )
    return -2 / beta * F.logsigmoid(beta * (nll - reference.detach())).mean()


def simnpo_loss(
    logits: Tensor, labels: Tensor, *, beta: float = 4.5, margin: float = 0.0
) -> Tensor:
    r"""SimNPO (Fan et al., 2024, arXiv 2410.07163, eq. 4): NPO by the mean over tokens, without a
    frozen model:

    .. math:: -\frac{2}{\beta} \, \mathbb{E}
              \log \sigma\left(\beta \left(\frac{\mathrm{nll}}{|y|} - m\right)\right)

    Args:
        logits, labels: as of :func:`answer_nll`.
        beta: > 0.
        margin: m, the paper's gamma over beta.

    Raises:
        ValueError: beta is not > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0; got {beta}")
    nll, lengths = answer_nll(logits, labels)
    return -2 / beta * F.logsigmoid(beta * (nll / lengths - margin)).mean()


@torch.no_grad()
def answer_probability(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Probability of each answer, with its length taken out as TOFU does (Maini et al., 2024):
    :math:`\pi(y | x)^{1 / |y|}`, of shape (n,), float32.

    Args:
        logits, labels: as of :func:`answer_nll`.
    """
    nll, lengths = answer_nll(logits, labels)
    return (-nll / lengths).exp()


def truth_ratio(wrong: Tensor, right: Tensor) -> Tensor:
    r"""How much more probable wrong answers are than the right one, by :func:`answer_probability`
    of each: the geometric mean of the wrong ones over the right one, as open-unlearning has it.

    For what is to be forgotten the mean of min(R, 1 / R) is reported (1: wrong and right cannot be
    told apart), for what is to be kept the mean of max(0, 1 - R).

    Args:
        wrong: (n, k), of k wrong answers to each question.
        right: (n,).

    Returns:
        R (n,).

    Raises:
        ValueError: shapes that do not fit.
    """
    if wrong.ndim != 2 or right.shape != wrong.shape[:1]:
        raise ValueError(
            f"wrong of shape {tuple(wrong.shape)} does not fit right of shape "
            f"{tuple(right.shape)}: give (n, k) and (n,)"
        )
    tiny = torch.finfo(wrong.dtype).tiny
    return (wrong.clamp(min=tiny).log().mean(1) - right.clamp(min=tiny).log()).exp()
