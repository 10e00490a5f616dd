"""The fused kernels for CUDA: the contract of `reference`, launches that do not grow with the
number of tensors or pools, and no wait for the device.

Selection, for both gradients and every pool at once:

1. A sample of each large pool, drawn on the device, guesses a window of at most WIDTH bins of the
   keys' upper 15 bits. Pools under WINDOW_MIN elements have none.
2. One pass counts the keys above the window, and those inside by their exact value. That proves the
   guess, in which case the key is known, or refutes it.
3. A radix selection (8 + 8 + 8 + 7 bits) serves what is left. It is launched always and leaves at
   once where nothing is.

The combination is one pass over all columns, in place; its sums go through one small second kernel.

What these kernels do not take (float64, layouts that differ between columns, theta0 or F on another
device) goes to `chunked`: the rows of a combination one by one, a selection as a whole. With
TRITON_INTERPRET=1, set before Triton is imported, all of this runs on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _tables, chunked
from ._tables import KINDS, Launch
from .contract import STATS, Columns, Update

__all__ = [
    "available",
    "combine",
    "finite_probe",
    "histogram",
    "restore",
    "scale",
    "select",
    "takes",
]

#: Elements from which a pool has a window: its 4 MiB of exact counts (a few KiB where all its
#: gradients have 16 bits) and the sample have to be worth it.
WINDOW_MIN, WINDOW_MIN_16 = 1 << 23, 1 << 20
SAMPLE_MIN, SAMPLE_MAX = 1 << 16, 1 << 20
#: Bins of a window. 16 hold 9 standard deviations of the sample even where magnitudes are spread
#: over many decades.
WIDTH = 16
TILE = 1024
#: The radix passes, whose counts fill many registers, run with twice the threads: with fewer some
#: versions of Triton spill a register or two.
RADIX_TILE = 2048
#: Programs of one radix launch at the most: they have to leave fast.
RADIX_PROGRAMS = 2048
_BINS = {0: 32, 1: 128, 2: 32}  # different keys in a window, at least a warp
_LOW_ZEROS = {0: 0, 1: 13, 2: 16}
#: No contraction to fused multiply-add, whatever Triton's default is: as in `reference`.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_RADIX = _OPTIONS | {"num_warps": 8}
_PENALTY = {"none": 0, "partial": 1, "full": 2}


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available() -> str | None:
    """None where these kernels can run, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds for Linux)"
    try:
        from . import _triton_kernels  # noqa: F401
    except Exception as error:  # a Triton that does not fit this torch, Python or driver
        return f"Triton cannot be imported: {error}"
    if _interpreted():
        import triton.language as tl

        if type(tl.sum).__name__ != "InterpretedFunction":  # made when Triton was imported
            return "TRITON_INTERPRET=1 was set after Triton had been imported"
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "these kernels are compiled for CUDA alone"
    return None


@cache
def _refuses(device: torch.device) -> str | None:
    """Why a card is not taken: it is too old for these kernels, or Triton cannot serve it here (no
    C compiler, a Triton without that card). One small launch tells, once for each device."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the kernels need compute capability 7.0, {device} has {major}.{minor}"
    try:
        finite_probe([torch.ones(16, device=device)])
    except Exception as error:
        return f"Triton's first launch on {device} failed: {type(error).__name__}: {error}"
    return None


def takes(tensors: Sequence[Tensor]) -> str | None:
    """None where these kernels serve such parameters, else the reason."""
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        return f"parameters lie on {len(devices)} devices"
    (device,) = devices
    if not _on_device(device):
        return f"Triton's kernels do not run on {device}"
    if all(t.dtype not in KINDS for t in tensors):
        return "all parameters are " + ", ".join(sorted({str(t.dtype) for t in tensors}))
    return _refuses(device) if device.type == "cuda" else None


def _on_device(device: torch.device) -> bool:
    return device.type == ("cpu" if _interpreted() else "cuda")


def _kernels() -> Any:
    from . import _triton_kernels

    return _triton_kernels


class _on:
    """Launches go to the current device, whatever the tensors' is."""

    def __init__(self, device: torch.device) -> None:
        self.context = torch.cuda.device(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self.context is not None:
            self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.context is not None:
            self.context.__exit__(*error)


# -- selection ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """Tables of one selection on the device, and what to launch over them."""

    chunks: Tensor  # [5, chunks]
    pools: Tensor  # [6, pools]
    members: Tensor  # the pools that have a window
    windowed: list[Launch]
    all: list[Launch]
    bins: int  # of all windows
    folds: int  # programs that add up one window's bins
    wide: bool  # some pool has more elements than 32 bits count
    host: Tensor


def _plan(
    pools: Sequence[tuple[Sequence[Tensor], int]], strides: list[int], device: torch.device
) -> _Plan:
    grads = [g for members, _ in pools for g in members]
    pool_of = np.repeat(np.arange(len(pools)), [len(members) for members, _ in pools])
    sizes = np.array([g.numel() for g in grads])
    kinds = np.array([KINDS[g.dtype] for g in grads])
    addresses = np.array([g.data_ptr() for g in grads])

    total = np.zeros(len(pools), np.int64)
    np.add.at(total, pool_of, sizes)
    shift = np.full(len(pools), 16)
    np.minimum.at(shift, pool_of, np.array([_LOW_ZEROS[k] for k in kinds.tolist()]))
    has_window = total >= np.where(shift == 0, WINDOW_MIN, WINDOW_MIN_16)
    members = np.flatnonzero(has_window)
    bins = np.where(has_window, (WIDTH << 16) >> shift, 0)
    window = np.where(has_window, np.cumsum(has_window) - 1, -1)
    samples = np.clip(total // 64, SAMPLE_MIN, SAMPLE_MAX)
    ranks = np.array([k for _, k in pools])
    pool_table = np.stack([total, ranks, window, shift, np.cumsum(bins) - bins, samples])

    # the chunks of one launch lie together
    order = np.lexsort((kinds, ~has_window[pool_of]))
    pool_of, sizes, kinds, addresses = (a[order] for a in (pool_of, sizes, kinds, addresses))
    steps = np.array(strides)[order]
    row, at, length, full = _tables.split(
        addresses[None], kinds[None], steps[None], sizes, _tables.CHUNK
    )
    chunks = np.stack([at[0], length, pool_of[row], steps[row], full])
    n_windowed = int(has_window[pool_of[row]].sum())
    kinds = kinds[row][None]
    windowed = _tables.launches(kinds[:, :n_windowed])
    (on_chunks, on_pools, on_members), host = _tables.upload([chunks, pool_table, members], device)
    return _Plan(
        on_chunks, on_pools, on_members, windowed,
        windowed + _tables.launches(kinds[:, n_windowed:], n_windowed),
        int(bins.sum()), max(1, int(bins.max()) // 4096), bool(total.max() >= 1 << 31), host,
    )  # fmt: skip


def _read_plan(
    pools: Sequence[tuple[Sequence[Tensor], int]], device: torch.device
) -> tuple[_Plan, Any]:
    """The plan for these gradients, and what has to live until the kernels are launched: a layout
    that is not one stretch of memory is copied."""
    dense, strides, key = [], [], []
    for members, k in pools:
        row: list[Tensor] = []
        for g in members:
            if g.numel():
                stride = _tables.flat_stride(g)
                row.append(g if stride is not None else g.contiguous())
                strides.append(1 if stride is None else stride)
        n = sum(g.numel() for g in row)
        if not 1 <= k <= n:
            raise ValueError(f"k must be in 1..{n}, the number of elements, got {k}")
        dense.append((row, k))
        key.append((k, *((g.data_ptr(), g.numel(), g.dtype) for g in row)))
    settings = (WINDOW_MIN, WINDOW_MIN_16, SAMPLE_MIN, SAMPLE_MAX, WIDTH, _tables.CHUNK)
    full_key = ("select", device, settings, tuple(key), tuple(strides))
    plan: _Plan = _tables.cached(full_key, device, lambda: _plan(dense, strides, device))
    return plan, dense


@torch.compiler.disable
@torch.no_grad()
def select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.select`; the host waits for nothing, so the plan is all it knows."""
    grads = [g for members, _ in pools for g in members]
    if not _same_device(grads) or dtype != torch.float32:
        return chunked.select(pools, dtype)
    device = grads[0].device
    plan, _alive = _read_plan(pools, device)
    with _on(device):
        keys, nonfinite, _ = _select(plan)
    return keys, nonfinite


def _same_device(grads: Sequence[Tensor]) -> bool:
    return (
        bool(grads)
        and _on_device(grads[0].device)
        and all(g.device == grads[0].device and g.dtype in KINDS for g in grads)
    )


class _Space(NamedTuple):
    """Memory of one selection, in one piece; it starts as zero."""

    counters: Tensor  # int64 [3 * windows]: keys above, keys inside, NaN and Inf
    partial: Tensor  # int64 [256 * windows]
    digits: Tensor  # [4 * 256 * pools], int64 where 32 bits do not count all elements
    samples: Tensor  # int32 [windows << 15]
    bins: Tensor  # int32, of all windows
    done: Tensor  # int32 [pools]: 1 where a window settled it
    settled: Tensor  # int32 [1]: how many are done


def _space(plan: _Plan) -> _Space:
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


def _select(plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, counts of NaN and Inf, and 1 for each pool that its window settled."""
    n_pools, device = plan.pools.shape[1], plan.chunks.device
    space = _space(plan)
    keys, nonfinite = torch.empty(2, n_pools, dtype=torch.int64, device=device)
    if len(plan.members):
        _launch_window(plan, space, keys)
    _launch_radix(plan, space)
    _kernels().finish_kernel[(n_pools,)](
        plan.pools, n_pools, space.digits, space.done, space.counters, keys, nonfinite, **_OPTIONS
    )
    return keys, nonfinite, space.done


def _launch_window(plan: _Plan, space: _Space, keys: Tensor) -> None:
    """Sample, window and one pass over the pools that have one."""
    kernels, n_windows = _kernels(), len(plan.members)
    table, pools = (plan.chunks, plan.chunks.shape[1]), (plan.pools, plan.pools.shape[1])
    bracket = torch.empty(n_windows * 2, dtype=torch.int64, device=plan.chunks.device)
    for (kind,), first, count in plan.windowed:
        kernels.sample_kernel[(count,)](
            *table, first, *pools, space.samples, KIND=kind, TILE=256, **_OPTIONS
        )
    kernels.bracket_kernel[(n_windows,)](
        *pools, plan.members, space.samples, bracket, WIDTH=WIDTH, **_OPTIONS
    )
    for (kind,), first, count in plan.windowed:
        kernels.window_kernel[(count,)](
            *table, first, *pools, bracket, space.counters, space.bins,
            KIND=kind, CHUNK=_tables.CHUNK, TILE=TILE, LANE=8 if kind else 1,
            BINS=max(32, _BINS[kind] * WIDTH // 16),
            **_OPTIONS,
        )  # fmt: skip
    kernels.fold_kernel[(n_windows, plan.folds)](
        *pools, plan.members, space.bins, space.partial, WIDTH=WIDTH, **_OPTIONS
    )
    kernels.settle_kernel[(n_windows,)](
        *pools, plan.members, bracket, space.counters, space.bins, space.partial, keys,
        space.done, space.settled, WIDTH=WIDTH, **_OPTIONS,
    )  # fmt: skip


def _launch_radix(plan: _Plan, space: _Space) -> None:
    table, pools = (plan.chunks, plan.chunks.shape[1]), (plan.pools, plan.pools.shape[1])
    for level in range(4):
        for (kind,), first, count in plan.all:
            _kernels().digit_kernel[(min(count, RADIX_PROGRAMS),)](
                *table, first, count, *pools, space.digits, space.done, space.settled,
                KIND=kind, LEVEL=level, CHUNK=_tables.CHUNK,
                TILE=min(RADIX_TILE, _tables.CHUNK), **_RADIX,
            )  # fmt: skip


@torch.compiler.disable
@torch.no_grad()
def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """As `reference.histogram`."""
    grads = [g for g in grads if g.numel()]
    if not _same_device(grads) or dtype != torch.float32 or not 5 <= bits <= 12:
        return chunked.histogram(grads, prefix, shift, bits, dtype)
    device = grads[0].device
    plan, _alive = _read_plan([(grads, 1)], device)
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    if not isinstance(prefix, Tensor):
        prefix = torch.full((), prefix, dtype=torch.int64, device=device)
    prefix = prefix.to(device)
    with _on(device):
        for (kind,), first, count in plan.all:
            _kernels().histogram_kernel[(count,)](
                plan.chunks, plan.chunks.shape[1], first, prefix, counts, KIND=kind, LOW=shift,
                BITS=bits, CHUNK=_tables.CHUNK, TILE=TILE, **_RADIX,
            )  # fmt: skip
    return counts


@torch.compiler.disable
@torch.no_grad()
def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """As `reference.finite_probe`, in two launches for each dtype."""
    tensors = [t for t in tensors if t.numel()]
    if not _same_device(tensors):
        return chunked.finite_probe(tensors)
    plan, _alive = _read_plan([(tensors, 1)], tensors[0].device)
    bits = torch.zeros((), dtype=torch.int32, device=tensors[0].device)
    with _on(bits.device):
        for (kind,), first, count in plan.all:
            _kernels().probe_kernel[(count,)](
                plan.chunks, plan.chunks.shape[1], first, bits, KIND=kind, CHUNK=_tables.CHUNK,
                TILE=TILE, **_OPTIONS,
            )  # fmt: skip
    return bits.view(torch.float32)


# -- combination ----------------------------------------------------------------------------------


Row = Sequence[Any]  # tensors, None where a column is missing; theta first


class _Table(NamedTuple):
    chunks: Tensor  # [11, chunks]
    launches: list[Launch]
    host: Tensor


def _columns(row: Row, device: torch.device) -> tuple[int, ...] | None:
    """KIND and stride of every column of a row; None where the kernel cannot take it.

    theta comes first; its layout is the row's, but for columns that are one expanded value.
    """
    theta = row[0]
    assert theta is not None
    found: list[int] = []
    lead = None if theta.is_contiguous() else theta.stride()
    for j, t in enumerate(row):
        if t is None:
            found += (-1, 0)
            continue
        kind = KINDS.get(t.dtype)
        if kind is None or t.device != device:
            return None
        if t.is_contiguous() if lead is None else t.stride() == lead:
            stride: int | None = 1
        else:
            stride = 0 if _tables.flat_stride(t) == 0 else None
        if stride is None or (j == 0 and _tables.flat_stride(t) is None):
            return None
        found += (kind, stride)
    return tuple(found)


def _table(
    rows: list[Row], columns: list[tuple[int, ...]], pairs: list[tuple[int, int]],
    device: torch.device,
) -> _Table:  # fmt: skip
    both = np.array(columns, np.int64).reshape(len(rows), 7, 2).transpose(2, 1, 0)
    kinds, strides = both
    order = np.lexsort(kinds)
    addresses = np.array([[0 if t is None else t.data_ptr() for t in row] for row in rows]).T
    sizes = np.array([row[0].numel() for row in rows])
    keys = np.array(pairs).T
    kinds, strides, addresses, keys = (a[:, order] for a in (kinds, strides, addresses, keys))
    row_of, at, length, full = _tables.split(addresses, kinds, strides, sizes[order], _tables.CHUNK)
    bits = (strides << np.arange(7)[:, None]).sum(0)
    table = np.concatenate(
        [at, length[None], keys[:, row_of], (bits[row_of] | full.astype(np.int64) << 7)[None]]
    )
    (chunks,), host = _tables.upload([table], device)
    return _Table(chunks, _tables.launches(kinds[:, row_of]), host)


def _rows_table(
    use: str, rows: list[Row], device: torch.device, pairs: list[tuple[int, int]]
) -> tuple[_Table | None, list[int]]:
    """The table of the rows that a kernel takes, and the indices of the others."""
    taken: list[int] = []
    columns: list[tuple[int, ...]] = []
    others: list[int] = []
    for i, row in enumerate(rows):
        found = _columns(row, device) if _on_device(device) else None
        if found is None:
            others.append(i)
        elif row[0].numel():
            taken.append(i)
            columns.append(found)
    if not taken:
        return None, others
    key = [
        (rows[i][0].numel(), pairs[i], found, *(0 if t is None else t.data_ptr() for t in rows[i]))
        for i, found in zip(taken, columns)
    ]
    table: _Table = _tables.cached(
        (use, device, _tables.CHUNK, *key),
        device,
        lambda: _table([rows[i] for i in taken], columns, [pairs[i] for i in taken], device),
    )
    return table, others


@torch.compiler.disable
@torch.no_grad()
def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """As `reference.combine`; `online` may be a 0-d tensor too. Tensors are read on the device."""
    device = stats.device
    rows: list[Row] = list(zip(*columns.tensors, strict=True))
    table, others = None, list(range(len(rows)))
    if how.dtype == torch.float32 and taus.device == device:
        pairs = list(zip(columns.pool_f, columns.pool_r, strict=True))
        table, others = _rows_table("combine", rows, device, pairs)
    if table is not None:
        there = {name: _there(getattr(how, name), device) for name in _SCALARS}
        with _on(device):
            _combine(table, taus, how._replace(**there), stats)
    if others:
        online = how.online.item() if isinstance(how.online, Tensor) else how.online
        chunked.combine(columns.rows(others), taus, how._replace(online=online), stats)


_SCALARS = ("gamma", "online", "inv_scale")


def _there(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _combine(table: _Table, taus: Tensor, how: Update, stats: Tensor) -> None:
    kernels, device = _kernels(), table.chunks.device
    n_chunks = table.chunks.shape[1]
    partial = torch.empty(len(STATS), n_chunks, dtype=torch.float64, device=device)
    on_f, on_r, on_m, only_r, blend, penalty = how.weights()
    gamma, online, inv_scale = how.gamma, how.online, how.inv_scale
    for kinds, start, count in table.launches:
        theta, f, r, anchor, fisher, to, kept = kinds
        kernels.combine_kernel[(count,)](
            table.chunks, n_chunks, start, taus, on_r, on_m, blend,
            gamma, 0.0 if online is None else online, 1.0 if inv_scale is None else inv_scale,
            partial,
            THETA=theta, F=f, R=r, ANCHOR=anchor, FISHER=fisher, OUT=to, HELD=kept,
            ROUTED=bool(only_r), FIRST=bool(on_f),
            PENALTY=_PENALTY[penalty] if anchor >= 0 and fisher >= 0 else 0,
            ONLINE=int(online is not None and fisher >= 0), SCALED=inv_scale is not None,
            GAMMA_AT=isinstance(gamma, Tensor), ONLINE_AT=isinstance(online, Tensor),
            CHUNK=_tables.CHUNK, TILE=min(TILE, 512 if max(kinds) == 0 else 1024),
            LANE=4 if max(kinds) == 0 else 8, **_OPTIONS,
        )  # fmt: skip
    kernels.reduce_kernel[(len(STATS),)](partial, n_chunks, stats, BLOCK=1024, **_OPTIONS)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """As `reference.scale`: its torch._foreach_mul_ takes many tensors a launch."""
    chunked.scale(tensors, factor)


@torch.compiler.disable
@torch.no_grad()
def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """As `reference.restore`, in one launch for each dtype."""
    if not params:
        return
    device = params[0].device
    rows: list[Row] = [(p, *[None] * 5, h) for p, h in zip(params, held) if h is not None]
    table, others = _rows_table("restore", rows, device, [(0, 0)] * len(rows))
    if table is not None:
        with _on(device):
            for kinds, first, count in table.launches:
                _kernels().restore_kernel[(count,)](
                    table.chunks, table.chunks.shape[1], first, THETA=kinds[0], HELD=kinds[6],
                    CHUNK=_tables.CHUNK, TILE=TILE, **_OPTIONS,
                )  # fmt: skip
    chunked.restore([rows[i][0] for i in others], [rows[i][6] for i in others])
