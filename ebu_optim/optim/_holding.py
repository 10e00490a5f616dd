"""In what dtype, where and in whose name theta0 and F are held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._shards import is_sharded, local

TensorMap = Mapping[str, Tensor] | Mapping[Tensor, Tensor]


class Holding(NamedTuple):
    """The options of that; see EBUOptimizer."""

    anchor_dtype: torch.dtype | None = None
    fisher_dtype: torch.dtype | None = None
    held_on: str | None = None
    anchor_source: str | None = None

    def check(self) -> None:
        half = (None, torch.float16, torch.bfloat16)
        if self.anchor_dtype not in half:
            raise ValueError(
                "anchor_dtype must be torch.float16, torch.bfloat16 or None (the parameter's); "
                f"got {self.anchor_dtype!r}"
            )
        if self.fisher_dtype not in (None, torch.bfloat16):
            raise ValueError(
                "fisher_dtype must be torch.bfloat16 or None (float32): float16 would turn an F "
                f"below 6e-8 into 0; got {self.fisher_dtype!r}"
            )
        if self.held_on not in (None, "cpu"):
            raise ValueError(
                f'held_on must be "cpu" or None (beside the parameters); got {self.held_on!r}'
            )
        if self.anchor_source is not None and not isinstance(self.anchor_source, str):
            raise TypeError(
                f"anchor_source must be a string, a hub id or a path; got {self.anchor_source!r}"
            )

    def anchor(self, t: Tensor, name: str) -> Tensor:
        """theta0 as it is to be held."""
        held = self._place(t, self.anchor_dtype or t.dtype)
        if self.anchor_dtype and not local(held).isfinite().all() and local(t).isfinite().all():
            raise ValueError(
                f"anchor_dtype={self.anchor_dtype} does not hold {name}, whose largest weight is "
                f"{local(t).abs().max().item():g}: use torch.bfloat16 or None"
            )
        return _compact(held)

    def fisher(self, t: Tensor) -> Tensor:
        """F as it is to be held."""
        return self._place(t, self.fisher_dtype or t.dtype)

    def _place(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        if self.held_on is None or t.device.type == self.held_on:
            return t.to(dtype)
        if is_sharded(t):
            raise ValueError(
                'held_on="cpu" with sharded parameters: use the CPUOffloadPolicy of fully_shard'
            )
        held = torch.empty(t.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        return held.copy_(t)


def _compact(t: Tensor) -> Tensor:
    """One expanded zero where theta0 is zero (LoRA's B): nothing is stored for it."""
    if t.numel() and not is_sharded(t) and not t.count_nonzero():
        return t.new_zeros(()).expand(t.shape)
    return t
