"""The conditions of a denoiser, its inputs other than x_t and t, for all prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...modules import tensor_hash


class Conditions(NamedTuple):
    """The inputs of the denoiser other than x_t and t, by the names that `Family.predict` uses.

    Attributes:
        each: tensors with one row per prompt.
        shared: tensors with one row for all prompts.
    """

    each: dict[str, Tensor]
    shared: dict[str, Tensor]

    @classmethod
    def of(cls, given: Tensor | Conditions) -> Conditions:
        """Conditions from text embeddings (n, L, D), or unchanged if given as conditions."""
        return cls({"encoder_hidden_states": given}, {}) if isinstance(given, Tensor) else given

    def rows(self, numbers: Any) -> Conditions:
        return Conditions({n: t[numbers] for n, t in self.each.items()}, self.shared)

    def hash(self) -> str:
        return tensor_hash(*self.each.values(), *self.shared.values())


def join(each: Mapping[str, Tensor]) -> Tensor:
    """Join conditions into one tensor: a single one (n, ...) unchanged, several as rows (n, F)."""
    if len(each) == 1:
        return next(iter(each.values()))
    return torch.cat([t.flatten(1) for t in each.values()], 1)


def split(joined: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Split the tensor of `join` into tensors whose rows have these shapes."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
    parts = joined.flatten(1).split(sizes, 1)
    return {n: t.view(-1, *shape) for (n, shape), t in zip(shapes.items(), parts, strict=True)}
