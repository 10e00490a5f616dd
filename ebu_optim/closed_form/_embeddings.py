"""Functions that the edits share: rows of embeddings, and the layers of a model that read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

#: The last parts of the names of the layers that read text in diffusers' UNets.
CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v")


def rows(name: str, given: Tensor, width: int | None = None) -> Tensor:
    """Return embeddings [..., d] as rows [n, d], float64.

    Raises:
        ValueError: there are no embeddings, or they are not finite or have another width.
    """
    if given.dim() < 1 or given.numel() == 0 or not given.isfinite().all():
        raise ValueError(
            f"{name} must be finite embeddings, (n, d); got a tensor of shape {tuple(given.shape)}"
        )
    if width is not None and given.shape[-1] != width:
        raise ValueError(
            f"{name} has embeddings of width {given.shape[-1]}, the others have {width}; encode "
            "all with the same text encoder"
        )
    return given.detach().reshape(-1, given.shape[-1]).double()


def pairs(erase: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of both; a single target is repeated.

    Raises:
        ValueError: there is neither one target for each embedding nor one for all.
    """
    c = rows("erase", erase)
    g = rows("targets", targets, c.shape[1])
    if len(g) not in (1, len(c)):
        raise ValueError(f"targets has {len(g)} rows; give one, or one for each of {len(c)}")
    return c, g.expand_as(c)


def number(name: str, value: float, *, least: float = 0.0, strictly: bool = False) -> float:
    """Return a finite number >= least (> least if `strictly`).

    Raises:
        ValueError: the number is not finite or too small.
    """
    if not math.isfinite(value) or value < least or (strictly and value == least):
        raise ValueError(
            f"{name} must be finite and {'>' if strictly else '>='} {least:g}; got {value!r}"
        )
    return float(value)


def gram(weights: Iterable[Tensor]) -> Tensor:
    """Return the sum of W^T W over weights [d_out, d_in], float64 [d_in, d_in].

    Raises:
        ValueError: there are no weights.
    """
    total: Tensor | None = None
    for w in weights:
        wide = w.detach().double()
        total = wide.T @ wide if total is None else total.addmm_(wide.T, wide)
    if total is None:
        raise ValueError("gram: weights is empty; give at least one weight")
    return total


def layers(model: nn.Module, endings: Sequence[str], width: int) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights of the linear layers with these name endings and d_in = width."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(endings)):
            if module.in_features != width:
                raise ValueError(
                    f"{name} reads embeddings of width {module.in_features}, the edit is for "
                    f"{width}; choose `endings` of layers that read the same embeddings"
                )
            yield name, module.weight


@torch.no_grad()
def apply(model: nn.Module, edit: Tensor, endings: Sequence[str] = CROSS_ATTENTION) -> list[str]:
    """W <- W R in place, in float64, for the layers that read the text.

    Args:
        model: a model such as a diffusers UNet.
        edit: R, [d_in, d_in].
        endings: the last parts of the layers' names; SPEED edits only the values,
            ``("attn2.to_v",)``.

    Returns:
        The names of the layers that were edited.

    Raises:
        ValueError: there is no such layer, or one has another width. Nothing was changed.
    """
    if edit.dim() != 2 or edit.shape[0] != edit.shape[1] or not edit.isfinite().all():
        raise ValueError(f"edit must be a finite square matrix; got shape {tuple(edit.shape)}")
    found = list(layers(model, endings, len(edit)))
    if not found:
        raise ValueError(
            f"endings: the model has no linear layer whose name ends in {', '.join(endings)}; give "
            "the endings of the layers that read text"
        )
    for _, weight in found:
        weight.copy_(weight.double() @ edit.to(weight.device, torch.float64))
    return [name for name, _ in found]
