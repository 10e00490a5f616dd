"""Comparison over the ranks of a process group: do they take the same step?

DistributedDataParallel reduces the gradient of a loss only if its backward pass follows its own
forward pass, and gives no warning otherwise. So the first steps compare checksums over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import reference

# What has to be equal, in the order of the checksums, and the remedy if it differs. The message
# gives the remedy of the first difference, because later ones may follow from it.
_REMEDIES = {
    "weights": (
        "load the same checkpoint on every rank and wrap the model in DistributedDataParallel, "
        "which broadcasts rank 0's, before the first phase; swap averaged weights (EMA) on every "
        "rank or on none"
    ),
    "forget gradient": "",
    "remember gradient": "",
    "loss scale": "give every rank the same GradScaler state",
    "theta0": "give every rank the same anchor, or build the optimizer before the weights move",
    "Fisher": "give every rank the same fisher; run warmup_fisher through DistributedDataParallel",
    "options": "give every rank the same alpha, delta, gamma and other options and schedules",
}
_ONE_GRADIENT = (
    "DistributedDataParallel reduced only one of the two gradients. Probably the losses were "
    "computed outside their phases: if both forward passes run before the first backward pass, one "
    "gradient is not reduced. Compute each loss, forward and backward, inside forget() or "
    "remember(). Leave no_sync() for the last micro-batch of each loss. A loss that uses only some "
    "parameters needs find_unused_parameters=True and no static_graph"
)
_BOTH_GRADIENTS = (
    "neither gradient was reduced. Probably the model is not wrapped in DistributedDataParallel "
    "while the ranks see different batches, or its .module was called instead of the wrapper, or "
    "no_sync() covered the last micro-batch. Compute each loss through the wrapper inside forget() "
    "or remember(), or all-reduce param.grad there yourself"
)


def alone() -> bool:
    """Whether there is no other rank to compare with."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def same_on_all_ranks(
    weights: Sequence[Tensor],
    g_f: Sequence[Tensor | None],
    g_r: Sequence[Tensor | None],
    scale: Tensor | None,
    anchor: Sequence[Tensor],
    fisher: Sequence[Tensor],
    options: Iterable[Any],
    device: torch.device,
) -> None:
    """Compare checksums over the default process group.

    The checksums cover the bits of everything that decides a step. If they are equal, everything
    that follows is equal on the same hardware: a skip or an error because of NaN or Inf,
    GradScaler's found_inf, thresholds, masks and G. The comparison comes before any rank may skip
    or raise, so no rank waits for another one. It takes one all_gather of a few integers.

    Raises:
        RuntimeError: on every rank, if the ranks differ in anything.
    """
    if "cpu:" in dist.get_backend_config():
        device = torch.device("cpu")
    parts = (weights, g_f, g_r, [scale], anchor, fisher)
    sums = [_checksum(part, device) for part in parts]
    text = torch.frombuffer(bytearray(repr(list(options)).encode()), dtype=torch.uint8)
    sums.append(_checksum([text], device))
    mine = torch.stack(sums)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    rows = torch.stack(gathered).cpu()
    differs = dict(zip(_REMEDIES, (rows != rows[0]).any(0).tolist(), strict=True))
    if any(differs.values()):
        raise RuntimeError(_message(differs, (rows != rows[0]).any(1).tolist()))


def _message(differs: Mapping[str, bool], ranks: Sequence[bool]) -> str:
    named = [name for name, differ in differs.items() if differ]
    first = named[0]
    both = differs["forget gradient"] and differs["remember gradient"]
    remedy = _REMEDIES[first] or (_BOTH_GRADIENTS if both else _ONE_GRADIENT)
    others = [str(r) for r, other in enumerate(ranks) if other]
    return (
        f"the ranks are about to take different steps: of {len(ranks)}, rank {', '.join(others)} "
        f"and rank 0 differ in {', '.join(named)}. No weight was changed. Remedy: {remedy}. "
        "If the processes share a process group but train independently on purpose, set "
        "opt.rank_checks = 0 in every one of them"
    )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _checksum(tensors: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Return a hash of the bits, their places, and which tensors are None, as 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for i, t in enumerate(tensors):
        if t is None:
            continue
        total += i + 1
        start = (i + 1) << 40
        for (piece,) in reference.pieces([t.detach()]):
            bits = piece.reshape(-1).view(_BITS[t.element_size()]).to(torch.int64, copy=True)
            # the sums of the bits of [1, -1] and [-1, 1] are equal, so the place is mixed in
            bits += torch.arange(start, start + len(bits), device=t.device).mul_(0x9E3779B97F4A7C1)
            for _ in range(2):
                bits.mul_(0x2545F4914F6CDD1D)
                bits ^= bits >> 29
            total += bits.sum().to(device)
            start += len(bits)
    return total
