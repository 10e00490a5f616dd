"""Selection on the device for pools that no window settled: a radix selection. Also the probe for
NaN and Inf. `_triton_window.py` describes the use of tl.histogram.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_parts import INF, kernel, load_float, magnitude
from ._triton_window import ADDRESS, FULL, LENGTH, POOL, RANK, STRIDE, WINDOW, find

DIGIT_BINS = tl.constexpr(256)
LEVELS = tl.constexpr(4)  # 8 + 8 + 8 + 7 bits


@triton.jit
def digit_tile(
    address,
    offs,
    mask,
    prefix,
    counts,
    unwanted,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    u = magnitude(load_float(address, offs, mask, KIND, IS_FULL))
    digit = (u >> LOW) & ((1 << BITS) - 1)
    if not IS_FULL or LOW + BITS < 31:
        wanted = (u >> LOW >> BITS) == prefix
        if not IS_FULL:
            wanted = wanted & mask
        digit = tl.where(wanted, digit, 0)
        unwanted += (wanted == 0).to(tl.int32)
    counts += tl.histogram(digit, 1 << BITS)
    return counts, unwanted


@triton.jit
def digit_chunk(
    table,
    n_chunks,
    c,
    prefix,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count, for each digit, the keys of chunk c that begin with `prefix`."""
    address = tl.load(table + ADDRESS * n_chunks + c)
    counts = tl.zeros((1 << BITS,), tl.int32)
    unwanted = tl.zeros((TILE,), tl.int32)
    if tl.load(table + FULL * n_chunks + c) != 0:
        for start in range(0, CHUNK, TILE):
            offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
            counts, unwanted = digit_tile(
                address, offs, offs >= 0, prefix, counts, unwanted, KIND, LOW, BITS, True
            )
    else:
        length = tl.load(table + LENGTH * n_chunks + c).to(tl.int32)
        stride = tl.load(table + STRIDE * n_chunks + c).to(tl.int32)
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            counts, unwanted = digit_tile(
                address,
                offs * stride,
                offs < length,
                prefix,
                counts,
                unwanted,
                KIND,
                LOW,
                BITS,
                False,
            )
    return counts - tl.where(tl.arange(0, 1 << BITS) == 0, tl.sum(unwanted, 0), 0)


@triton.jit
def prefix_of(hist, pool, rank, LEVEL: tl.constexpr):
    """Return the key's first LEVEL digits, from the counts of former levels, and the rank left."""
    bins = tl.arange(0, DIGIT_BINS)
    prefix = tl.zeros((), tl.int64)
    for level in tl.static_range(LEVEL):
        counts = tl.load(hist + (pool * LEVELS + level) * DIGIT_BINS + bins).to(tl.int64)
        digit, rank = find(counts, bins, rank)
        prefix = (prefix << (7 if level == 3 else 8)) | digit
    return prefix, rank


@kernel
def digit_kernel(
    table,
    n_chunks,
    first,
    count,
    pools,
    n_pools,
    hist,
    done,
    settled,
    KIND: tl.constexpr,
    LEVEL: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Run one level of the radix selection for the pools that no window settled.

    It is always launched, because the host does not know whether there are such pools. Without
    them it ends at once.
    """
    LOW: tl.constexpr = (23, 15, 7, 0)[LEVEL]
    BITS: tl.constexpr = (8, 8, 8, 7)[LEVEL]
    if tl.load(settled) < n_pools:
        for i in range(tl.program_id(0), count, tl.num_programs(0)):
            c = (first + i).to(tl.int64)
            pool = tl.load(table + POOL * n_chunks + c)
            if tl.load(done + pool) == 0:
                rank = tl.load(pools + RANK * n_pools + pool)
                prefix, _ = prefix_of(hist, pool, rank, LEVEL)
                counts = digit_chunk(
                    table, n_chunks, c, prefix.to(tl.int32), KIND, LOW, BITS, CHUNK, TILE
                )
                bins = hist + (pool * LEVELS + LEVEL) * DIGIT_BINS + tl.arange(0, 1 << BITS)
                tl.atomic_add(
                    bins, counts.to(hist.dtype.element_ty), mask=counts > 0, sem="relaxed"
                )


@kernel
def finish_kernel(pools, n_pools, hist, done, counters, keys, nonfinite):
    """Write every pool's key, at most the key of Inf plus 1, and its number of NaN and Inf."""
    pool = tl.program_id(0).to(tl.int64)
    if tl.load(done + pool) != 0:
        key = tl.load(keys + pool)
        window = tl.load(pools + WINDOW * n_pools + pool)
        bad = tl.load(counters + 3 * window + 2)
    else:
        key, _ = prefix_of(hist, pool, tl.load(pools + RANK * n_pools + pool), LEVELS)
        # the first digit is the exponent
        bad = tl.load(hist + pool * LEVELS * DIGIT_BINS + 255).to(tl.int64)
    tl.store(keys + pool, tl.minimum(key, INF + 1))
    tl.store(nonfinite + pool, bad)


@kernel
def histogram_kernel(
    table,
    n_chunks,
    first,
    prefix,
    hist,
    KIND: tl.constexpr,
    LOW: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the digits of one chunk to `hist`, int64 [2**BITS]."""
    c = (first + tl.program_id(0)).to(tl.int64)
    start = tl.load(prefix).to(tl.int32)
    counts = digit_chunk(table, n_chunks, c, start, KIND, LOW, BITS, CHUNK, TILE)
    bins = hist + tl.arange(0, 1 << BITS)
    tl.atomic_add(bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@kernel
def probe_kernel(
    table, n_chunks, first, bits, KIND: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Set `bits` to those of a float32 NaN if an element of the chunk is NaN or Inf."""
    c = (first + tl.program_id(0)).to(tl.int64)
    address = tl.load(table + ADDRESS * n_chunks + c)
    length = tl.load(table + LENGTH * n_chunks + c).to(tl.int32)
    stride = tl.load(table + STRIDE * n_chunks + c).to(tl.int32)
    largest = tl.zeros((TILE,), tl.int32)
    if tl.load(table + FULL * n_chunks + c) != 0:
        for start in range(0, CHUNK, TILE):
            offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
            u = magnitude(load_float(address, offs, offs >= 0, KIND, True))
            largest = tl.maximum(largest, u)
    else:
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            u = magnitude(load_float(address, offs * stride, offs < length, KIND, False))
            largest = tl.maximum(largest, u)
    if tl.max(largest, 0) >= INF:
        tl.atomic_or(bits, 0x7FC00000, sem="relaxed")
