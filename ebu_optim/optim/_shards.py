"""Sharded parameters: DTensors of `fully_shard` or of tensor parallelism.

The kernels see only the local parts. Counts are summed over the processes: the histograms of a
radix selection for the thresholds, and one vector for the statistics. Processes exchange integers
and a dozen floats but no gradients, and the volume does not depend on the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import reference

if TYPE_CHECKING:
    from ._slots import Key, Slot

T = TypeVar("T", bound="Tensor | None")

# The first digit of a float32 key is the exponent and three bits of the mantissa; that of a float64
# key is the exponent. So in both, no finite value shares its first digit with Inf and NaN.
_DIGITS = {torch.float32: (11, 10, 10), torch.float64: (11, 13, 13, 13, 13)}


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(t, "placements")


def any_sharded(tensors: Iterable[Any]) -> bool:
    return any(map(hasattr, tensors, repeat("placements")))


def local(t: T) -> T:
    """Return this process's part of a DTensor, sharing its memory, or any other tensor as it is."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[union-attr]


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return the local `part` as a DTensor sharded like `whole`, or as it is for a plain tensor."""
    if not is_sharded(whole):
        return part
    kind: Any = type(whole) if type(whole).__name__ == "DTensor" else _dtensor()
    laid_out: Any = whole
    return kind.from_local(
        part,
        laid_out.device_mesh,
        laid_out.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def local_gradient(grad: Tensor | None, p: Tensor) -> Tensor | None:
    """Return the part of a gradient that belongs to this process's part of the parameter."""
    if grad is None or not is_sharded(p):
        return grad
    part = spread(grad, p)._local_tensor  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part  # the collective may be asynchronous


def spread(value: Tensor, whole: Tensor) -> Tensor:
    """Return `value`, a full tensor that every process has, sharded like `whole`."""
    if not is_sharded(whole):
        return value
    mesh, placements = whole.device_mesh, whole.placements  # type: ignore[attr-defined]
    if is_sharded(value):
        same = value.placements == placements  # type: ignore[attr-defined]
        return value if same else value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    replicated = _dtensor().from_local(value, mesh, run_check=False)
    return replicated.redistribute(mesh, placements)


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


class Shards:
    """Which process counts which part of the parameters. False if nothing is sharded.

    Args:
        slots: the optimizer's parameters.

    Raises:
        TypeError: the DTensors use different meshes.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._mesh: Any = None
        self._counts: dict[Key, bool] = {}
        self._numel: dict[Key, int] = {}
        slots = list(slots)
        if not any_sharded([s.param for s in slots]):
            return
        for s in slots:
            if not is_sharded(s.param):
                continue
            mesh = s.param.device_mesh  # type: ignore[attr-defined]
            if self._mesh is not None and mesh != self._mesh:
                raise TypeError(
                    f"{s.name} is a DTensor over {mesh}, others are over {self._mesh}: one step "
                    "needs one mesh; shard all of them over the same (n-dimensional) mesh"
                )
            self._mesh = mesh
        for s in slots:
            self._numel[s.key] = s.param.numel()
            self._counts[s.key] = self._first_holder(s.param)

    def __bool__(self) -> bool:
        return self._mesh is not None

    def _first_holder(self, p: Tensor) -> bool:
        """Whether this process counts the part that it holds of `p`.

        If several processes hold the same part, only the first one counts it.
        """
        if self._mesh is None:
            return True
        coordinate = self._mesh.get_coordinate()
        placements = p.placements if is_sharded(p) else [None] * len(coordinate)  # type: ignore[attr-defined]
        return all(
            (placement is not None and placement.is_shard()) or c == 0
            for placement, c in zip(placements, coordinate, strict=True)
        )

    def counts(self, key: Key) -> bool:
        """Whether this process counts its part of the parameter."""
        return self._counts.get(key, True)

    def numel(self, slot: Slot) -> int:
        """Return the number of scalars in the whole parameter."""
        return self._numel.get(slot.key, slot.param.numel())

    def add(self, t: Tensor) -> None:
        """Sum in place over the processes, with one collective per dimension of the mesh."""
        if self._mesh is None:
            return
        for dim in range(self._mesh.ndim):
            dist.all_reduce(t, group=self._mesh.get_group(dim))

    def select(
        self,
        backend: Any,
        pools: Sequence[tuple[Sequence[Tensor], int]],
        owned: Sequence[Sequence[bool]],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Return what `kernels.reference.select` returns, over the parts of all processes.

        Every process gets the keys of the whole tensors, bit for bit.

        Args:
            pools: the local parts that are ranked together, and their rank in the whole pool.
            owned: which of these parts this process counts.
        """
        device = pools[0][0][0].device
        parts = [
            [g for g, mine in zip(grads, counted, strict=True) if mine]
            for (grads, _), counted in zip(pools, owned, strict=True)
        ]
        left = torch.tensor([k for _, k in pools], device=device)  # rank among keys with `prefix`
        prefix = torch.zeros_like(left)
        shift, nonfinite = reference.key_bits(dtype), torch.zeros_like(left)
        for i, bits in enumerate(_DIGITS[dtype]):
            shift -= bits
            counts = torch.stack(
                [
                    backend.histogram(grads, prefix[j], shift, bits, dtype).to(device)
                    for j, grads in enumerate(parts)
                ]
            )
            self.add(counts)
            if i == 0:
                nonfinite = counts[:, reference.key_of_inf(dtype) >> shift :].sum(1)
            above = counts.flip(1).cumsum(1).flip(1)  # keys with this digit or a higher one
            digit = (above >= left[:, None]).sum(1) - 1
            left = left - above.gather(1, digit[:, None])[:, 0]
            left = left + counts.gather(1, digit[:, None])[:, 0]
            prefix = (prefix << bits) | digit
        return prefix.clamp_(max=reference.key_of_inf(dtype) + 1), nonfinite
