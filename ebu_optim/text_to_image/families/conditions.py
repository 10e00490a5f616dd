"""What a denoiser is told beside x_t and t, for all prompts of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...modules import tensor_hash


class Conditions(NamedTuple):
    """What the denoiser is told beside x_t and t, by the names that `Family.predict` knows.

    Attributes:
        each: tensors with a row for each prompt.
        shared: tensors with one row, for all prompts.
    """

    each: dict[str, Tensor]
    shared: dict[str, Tensor]

    @classmethod
    def of(cls, given: Tensor | Conditions) -> Conditions:
        """Text embeddings (n, L, D) alone are such conditions too."""
        return cls({"encoder_hidden_states": given}, {}) if isinstance(given, Tensor) else given

    def rows(self, numbers: Any) -> Conditions:
        return Conditions({n: t[numbers] for n, t in self.each.items()}, self.shared)

    def hash(self) -> str:
        return tensor_hash(*self.each.values(), *self.shared.values())


def join(each: Mapping[str, Tensor]) -> Tensor:
    """One tensor for them: (n, ...) of a single one, as it is, or all numbers of a row, (n, F)."""
    if len(each) == 1:
        return next(iter(each.values()))
    return torch.cat([t.flatten(1) for t in each.values()], 1)


def split(joined: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The tensors of `join`, whose rows have these shapes."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes.values()]
    parts = joined.flatten(1).split(sizes, 1)
    return {n: t.view(-1, *shape) for (n, shape), t in zip(shapes.items(), parts, strict=True)}
