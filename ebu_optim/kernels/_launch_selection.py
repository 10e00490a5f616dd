"""Exact selection: its launches, for all pools at once, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _launch, _launch_plan, _tables, chunked
from ._launch import OPTIONS, on, one_device
from ._launch_plan import Plan, Pools, read_plan

#: The counts of the radix passes fill many registers, so these passes use twice the threads. With
#: fewer threads some versions of Triton spill a register or two.
RADIX_TILE = 2048
#: The most programs of one radix launch, because they must end quickly.
RADIX_PROGRAMS = 2048
_RADIX = OPTIONS | {"num_warps": 8}
_BINS = {0: 32, 1: 128, 2: 32}  # different keys in a window, and at least a warp


@torch.compiler.disable
@torch.no_grad()
def select(pools: Pools, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `reference.select`. The host does not wait for the device: it uses only the plan."""
    grads = [g for members, _ in pools for g in members]
    if not one_device(grads) or dtype != torch.float32:
        return chunked.select(pools, dtype)
    device = grads[0].device
    plan, _alive = read_plan(pools, device)
    with on(device):
        keys, nonfinite, _ = _select(plan)
    return keys, nonfinite


class _Space(NamedTuple):
    """The memory of one selection, in one piece and initially zero."""

    counters: Tensor  # int64 [3 * windows]: keys above, keys inside, NaN and Inf
    partial: Tensor  # int64 [256 * windows]
    digits: Tensor  # [4 * 256 * pools], int64 if 32 bits cannot count all elements
    samples: Tensor  # int32 [windows << 15]
    bins: Tensor  # int32, of all windows
    done: Tensor  # int32 [pools]: 1 if a window settled the pool
    settled: Tensor  # int32 [1]: how many pools are done


def _space(plan: Plan) -> _Space:
    n_pools, n_windows = plan.pools.shape[1], len(plan.members)
    digits = n_pools * 4 * 256
    # the 64-bit parts come first
    words = [3 * n_windows, 256 * n_windows, digits if plan.wide else 0]
    halves = [n_windows << 15, plan.bins, n_pools, 1, 0 if plan.wide else digits]
    size = sum(words) + -(-sum(halves) // 2)
    space = torch.zeros(size, dtype=torch.int64, device=plan.chunks.device)
    counters, partial, wide = space[: sum(words)].split(words)
    rest = space[sum(words) :].view(torch.int32)[: sum(halves)]
    samples, bins, done, settled, narrow = rest.split(halves)
    return _Space(counters, partial, wide if plan.wide else narrow, samples, bins, done, settled)


def _select(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, counts of NaN and Inf, and 1 for each pool that its window settled."""
    n_pools, device = plan.pools.shape[1], plan.chunks.device
    space = _space(plan)
    keys, nonfinite = torch.empty(2, n_pools, dtype=torch.int64, device=device)
    if len(plan.members):
        _launch_window(plan, space, keys)
    _launch_radix(plan, space)
    _launch.kernels().finish_kernel[(n_pools,)](
        plan.pools, n_pools, space.digits, space.done, space.counters, keys, nonfinite, **OPTIONS
    )
    return keys, nonfinite, space.done


def _launch_window(plan: Plan, space: _Space, keys: Tensor) -> None:
    """Launch sample, window and one pass over the pools that have a window."""
    kernels, n_windows = _launch.kernels(), len(plan.members)
    table, pools = (plan.chunks, plan.chunks.shape[1]), (plan.pools, plan.pools.shape[1])
    bracket = torch.empty(n_windows * 2, dtype=torch.int64, device=plan.chunks.device)
    for (kind,), first, count in plan.windowed:
        kernels.sample_kernel[(count,)](
            *table, first, *pools, space.samples, KIND=kind, TILE=256, **OPTIONS
        )
    kernels.bracket_kernel[(n_windows,)](
        *pools, plan.members, space.samples, bracket, WIDTH=_launch_plan.WIDTH, **OPTIONS
    )
    for (kind,), first, count in plan.windowed:
        kernels.window_kernel[(count,)](
            *table,
            first,
            *pools,
            bracket,
            space.counters,
            space.bins,
            KIND=kind,
            CHUNK=_tables.CHUNK,
            TILE=_launch.TILE,
            LANE=8 if kind else 1,
            BINS=max(32, _BINS[kind] * _launch_plan.WIDTH // 16),
            **OPTIONS,
        )
    kernels.fold_kernel[(n_windows, plan.folds)](
        *pools, plan.members, space.bins, space.partial, WIDTH=_launch_plan.WIDTH, **OPTIONS
    )
    kernels.settle_kernel[(n_windows,)](
        *pools,
        plan.members,
        bracket,
        space.counters,
        space.bins,
        space.partial,
        keys,
        space.done,
        space.settled,
        WIDTH=_launch_plan.WIDTH,
        **OPTIONS,
    )


def _launch_radix(plan: Plan, space: _Space) -> None:
    table, pools = (plan.chunks, plan.chunks.shape[1]), (plan.pools, plan.pools.shape[1])
    for level in range(4):
        for (kind,), first, count in plan.all:
            _launch.kernels().digit_kernel[(min(count, RADIX_PROGRAMS),)](
                *table,
                first,
                count,
                *pools,
                space.digits,
                space.done,
                space.settled,
                KIND=kind,
                LEVEL=level,
                CHUNK=_tables.CHUNK,
                TILE=min(RADIX_TILE, _tables.CHUNK),
                **_RADIX,
            )


@torch.compiler.disable
@torch.no_grad()
def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.histogram`."""
    grads = [g for g in grads if g.numel()]
    if not one_device(grads) or dtype != torch.float32 or not 5 <= bits <= 12:
        return chunked.histogram(grads, prefix, shift, bits, dtype)
    device = grads[0].device
    plan, _alive = read_plan([(grads, 1)], device)
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    if not isinstance(prefix, Tensor):
        prefix = torch.full((), prefix, dtype=torch.int64, device=device)
    prefix = prefix.to(device)
    with on(device):
        for (kind,), first, count in plan.all:
            _launch.kernels().histogram_kernel[(count,)](
                plan.chunks,
                plan.chunks.shape[1],
                first,
                prefix,
                counts,
                KIND=kind,
                LOW=shift,
                BITS=bits,
                CHUNK=_tables.CHUNK,
                TILE=_launch.TILE,
                **_RADIX,
            )
    return counts


@torch.compiler.disable
@torch.no_grad()
def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """As `reference.finite_probe`, with two launches per dtype."""
    tensors = [t for t in tensors if t.numel()]
    if not one_device(tensors):
        return chunked.finite_probe(tensors)
    plan, _alive = read_plan([(tensors, 1)], tensors[0].device)
    bits = torch.zeros((), dtype=torch.int32, device=tensors[0].device)
    with on(bits.device):
        for (kind,), first, count in plan.all:
            _launch.kernels().probe_kernel[(count,)](
                plan.chunks,
                plan.chunks.shape[1],
                first,
                bits,
                KIND=kind,
                CHUNK=_tables.CHUNK,
                TILE=_launch.TILE,
                **OPTIONS,
            )
    return bits.view(torch.float32)
