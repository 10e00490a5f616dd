"""The dtype and the place in which theta0 and F are held, and theta0 by reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..modules import tensor_hash
from ._shards import is_sharded, local

TensorMap = Mapping[str, Tensor] | Mapping[Tensor, Tensor]


class Holding(NamedTuple):
    """The options about how theta0 and F are held; see EBUOptimizer."""

    anchor_dtype: torch.dtype | None = None
    fisher_dtype: torch.dtype | None = None
    held_on: str | None = None
    anchor_source: str | None = None

    def check(self) -> None:
        half = (None, torch.float16, torch.bfloat16)
        if self.anchor_dtype not in half:
            raise ValueError(
                "anchor_dtype must be torch.float16, torch.bfloat16 or None (the parameter's "
                f"dtype); got {self.anchor_dtype!r}"
            )
        if self.fisher_dtype not in (None, torch.bfloat16):
            raise ValueError(
                "fisher_dtype must be torch.bfloat16 or None (float32), because float16 would turn "
                f"an F below 6e-8 into 0; got {self.fisher_dtype!r}"
            )
        if self.held_on not in (None, "cpu"):
            raise ValueError(
                f'held_on must be "cpu" or None (with the parameters); got {self.held_on!r}'
            )
        if self.anchor_source is not None and not isinstance(self.anchor_source, str):
            raise TypeError(
                f"anchor_source must be a string (a hub id or a path); got {self.anchor_source!r}"
            )

    def anchor(self, t: Tensor, name: str) -> Tensor:
        """Return theta0 in the dtype and place in which it is held."""
        held = self._place(t, self.anchor_dtype or t.dtype)
        if self.anchor_dtype and not local(held).isfinite().all() and local(t).isfinite().all():
            raise ValueError(
                f"anchor_dtype={self.anchor_dtype} cannot represent {name}, whose largest weight "
                f"is {local(t).abs().max().item():g}; use torch.bfloat16 or None"
            )
        return _compact(held)

    def fisher(self, t: Tensor) -> Tensor:
        """Return F in the dtype and place in which it is held."""
        return self._place(t, self.fisher_dtype or t.dtype)

    def _place(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        if self.held_on is None or t.device.type == self.held_on:
            return t.to(dtype)
        if is_sharded(t):
            raise ValueError(
                'held_on="cpu" with sharded parameters; use the CPUOffloadPolicy of fully_shard'
            )
        held = torch.empty(t.shape, dtype=dtype, pin_memory=torch.cuda.is_available())
        return held.copy_(t)


class Reference:
    """theta0 by reference: a checkpoint holds its source and its hash instead of its values.

    Args:
        source: a hub id or a path; None if checkpoints hold theta0 itself.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.forget()

    def forget(self) -> None:
        """Drop the cached hash, because theta0 has changed."""
        self._hash: tuple[tuple[Any, ...], str] | None = None

    def of(self, anchor: Mapping[Any, Tensor], keys: Iterable[Any]) -> dict[str, Any]:
        """Return the source and the hash of `anchor` for the checkpoint.

        The hash is over `keys` in that order. It is None as long as theta0 is not taken.
        """
        if self.source is None:
            return {}
        order = tuple(key for key in keys if key in anchor)
        if order and (self._hash is None or self._hash[0] != order):
            if any(is_sharded(anchor[key]) for key in order):
                raise ValueError(
                    "anchor_source with sharded parameters: no process holds all of theta0 to hash "
                    "it; leave anchor_source out and save with torch.distributed.checkpoint"
                )
            self._hash = order, tensor_hash(*(anchor[key] for key in order))
        found = self._hash[1] if self._hash and order else None
        return {"ebu_anchor_source": self.source, "ebu_anchor_hash": found}

    def check(
        self, counters: Mapping[str, Any], given: Mapping[Any, Tensor], keys: Iterable[Any]
    ) -> None:
        """Raise ValueError if a checkpoint only names theta0 and the given one does not match.

        Args:
            counters: the counters of the checkpoint.
            given: theta0 as it was passed to the optimizer.
            keys: the keys in the order of the checkpoint, in which its hash was computed.
        """
        source, saved = (counters.get(f"ebu_anchor_{n}") for n in ("source", "hash"))
        if source is None or saved is None:
            return
        here = self.of(given, keys) if given else {}
        remedy = (
            f"build EBUOptimizer(..., anchor=<the weights of {source}>, anchor_source={source!r}) "
            "with the same anchor_dtype"
        )
        if not here:
            raise ValueError(f"the checkpoint only refers to theta0 at {source!r}; {remedy}")
        if here["ebu_anchor_hash"] != saved:
            raise ValueError(
                f"the given anchor is not the theta0 of the checkpoint ({source!r}, hash {saved}; "
                f"given: {here['ebu_anchor_hash']}); {remedy}"
            )


def _compact(t: Tensor) -> Tensor:
    """Return one expanded zero if theta0 is all zeros (LoRA's B), which needs no storage."""
    if t.numel() and not is_sharded(t) and not t.count_nonzero():
        return t.new_zeros(()).expand(t.shape)
    return t
