"""Selection on the device by a window: a sample guesses a window of keys, one pass counts them.

tl.histogram gave wrong counts for inputs laid out by tl.dot or a reduction (triton#6987). Here its
input comes from loads, a tile has at least as many elements as the block has threads, and no input
is out of the range of the bins: values that must not be counted go to bin 0 and are subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_parts import INF, by_thread, kernel, load_float, magnitude

# rows of the selection's table, [5, chunks] int64
ADDRESS = tl.constexpr(0)
LENGTH = tl.constexpr(1)
POOL = tl.constexpr(2)
STRIDE = tl.constexpr(3)  # 1, or 0 for one expanded value
FULL = tl.constexpr(4)  # whether the unmasked branch may be used

# rows of the pools' table, [6, pools] int64
SIZE = tl.constexpr(0)
RANK = tl.constexpr(1)
WINDOW = tl.constexpr(2)  # the pool's index among the pools that have a window, or -1
SHIFT = tl.constexpr(3)  # number of low bits that are zero in all keys of the pool
OFFSET = tl.constexpr(4)  # of the pool's bins among all windows' bins
SAMPLES = tl.constexpr(5)

TOP = tl.constexpr(16)  # a window is made of whole bins of the keys' upper 15 bits
FOLD = tl.constexpr(4096)  # bins of a window that one program adds up
FOLDS = tl.constexpr(256)


@triton.jit
def find(counts, bins, rank):
    """Return the bin of the element with this rank from the top, and its rank inside that bin.

    counts: the counts of the bins 0, 1, ... `bins`; 1 <= rank <= their sum.
    """
    from_top = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    found = tl.maximum(tl.sum((from_top >= rank).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(bins > found, counts, 0), 0)
    return found, rank - above


# -- selection: the guess -------------------------------------------------------------------------


@kernel
def sample_kernel(
    table, n_chunks, first, pools, n_pools, samples, KIND: tl.constexpr, TILE: tl.constexpr
):
    """Count the upper 15 bits of some keys of every chunk, drawn by a hash with a fixed seed.

    A chunk contributes its share of the pool's SAMPLES, rounded at random.
    """
    c = (first + tl.program_id(0)).to(tl.int64)
    address = tl.load(table + ADDRESS * n_chunks + c)
    length = tl.load(table + LENGTH * n_chunks + c)
    pool = tl.load(table + POOL * n_chunks + c)
    stride = tl.load(table + STRIDE * n_chunks + c)
    size = tl.load(pools + SIZE * n_pools + pool)
    wanted = tl.load(pools + SAMPLES * n_pools + pool)
    window = tl.load(pools + WINDOW * n_pools + pool)
    draw = tl.rand(0x0EB0, c.to(tl.int32))
    count = (length * wanted) // size
    left = (length * wanted - count * size).to(tl.float32) / size.to(tl.float32)
    count += (draw < left).to(tl.int64)
    bins = samples + window * 32768
    for start in range(0, count, TILE):
        offs = start + tl.arange(0, TILE)
        random = tl.randint(c.to(tl.int32) + 1, offs.to(tl.int32)).to(tl.uint32, bitcast=True)
        where = (random.to(tl.int64) * length) >> 32
        mask = offs < count
        u = magnitude(load_float(address, where * stride, mask, KIND, False))
        tl.atomic_add(bins + (u >> 16), tl.full((TILE,), 1, tl.int32), mask=mask, sem="relaxed")


@triton.jit
def sampled_bin(start, sums, rows, rank):
    """Return the bin of the sample's element of this rank; `sums` are over 128 bins each."""
    row, left = find(sums, rows, rank)
    cells = tl.arange(0, 128)
    cell, _ = find(tl.load(start + row * 128 + cells), cells, left)
    return row * 128 + cell


@kernel
def bracket_kernel(pools, n_pools, members, samples, bracket, WIDTH: tl.constexpr):
    """Find the window from a sample: the first and last of at most WIDTH bins that hold the rank.

    It extends 4.5 standard deviations to either side, or WIDTH bins around the guess if that is
    less. A window that would hold a quarter of all elements is refused (last = -1), because the
    increments of `window_kernel` would queue at a few addresses.
    """
    w = tl.program_id(0).to(tl.int64)
    pool = tl.load(members + w)
    n = tl.load(pools + SIZE * n_pools + pool)
    k = tl.load(pools + RANK * n_pools + pool)
    shift = tl.load(pools + SHIFT * n_pools + pool)
    start = samples + w * 32768
    rows = tl.arange(0, 256)
    sums = tl.zeros((256,), tl.int32)
    for column in range(0, 128, 8):
        at = start + column + rows[:, None] * 128 + tl.arange(0, 8)[None, :]
        sums += tl.sum(tl.load(at), 1)
    total = tl.sum(sums, 0)
    share = k.to(tl.float32) / n.to(tl.float32)
    rank = tl.minimum(tl.maximum((share * total.to(tl.float32)).to(tl.int32), 1), total)
    margin = (4.5 * tl.sqrt(rank.to(tl.float32) * (1 - share)) + 2).to(tl.int32)
    middle = sampled_bin(start, sums, rows, rank)
    lowest = tl.zeros((), tl.int32)
    highest = lowest + 32767
    if rank + margin <= total:
        lowest = sampled_bin(start, sums, rows, rank + margin)
    if rank - margin >= 1:
        highest = sampled_bin(start, sums, rows, rank - margin)
    if highest - lowest >= WIDTH:
        lowest = tl.maximum(middle - WIDTH // 2, 0)
        highest = tl.minimum(lowest + WIDTH - 1, 32767)
    # zeros, in bin 0, cause no increments
    bins = lowest + tl.arange(0, WIDTH)
    inside = tl.sum(tl.load(start + bins, mask=(bins <= highest) & (bins > 0), other=0), 0)
    if (shift == 0) & (inside * 4 > total):
        highest = lowest * 0 - 1
    tl.store(bracket + 2 * w, lowest.to(tl.int64))
    tl.store(bracket + 2 * w + 1, highest.to(tl.int64))


# -- selection: one pass --------------------------------------------------------------------------


@triton.jit
def window_tile(
    address,
    offs,
    mask,
    base,
    top,
    shift,
    hist,
    above,
    inside,
    bad,
    local,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
    LANE: tl.constexpr,
    BINS: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    u = magnitude(load_float(address, offs, mask, KIND, IS_FULL))
    within = (u >= base) & (u <= top) & (u != 0)
    above += by_thread((u > top).to(tl.int32), LANE)
    inside += by_thread(within.to(tl.int32), LANE)
    bad += by_thread((u >= INF).to(tl.int32), LANE)
    if KIND == 0:
        one = tl.full((TILE,), 1, tl.int32)
        tl.atomic_add(hist + ((u - base) >> shift), one, mask=within, sem="relaxed")
    else:  # there are few different keys: counting here avoids a queue of increments
        local += tl.histogram(tl.where(within, (u - base) >> (16 if KIND == 2 else 13), 0), BINS)
    return above, inside, bad, local


@kernel
def window_kernel(
    table,
    n_chunks,
    first,
    pools,
    n_pools,
    bracket,
    counters,
    hist,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    LANE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count the keys above the window, those inside by their exact value, and NaN and Inf."""
    c = (first + tl.program_id(0)).to(tl.int64)
    pool = tl.load(table + POOL * n_chunks + c)
    window = tl.load(pools + WINDOW * n_pools + pool)
    last = tl.load(bracket + 2 * window + 1)
    if last >= 0:
        address = tl.load(table + ADDRESS * n_chunks + c)
        length = tl.load(table + LENGTH * n_chunks + c).to(tl.int32)
        stride = tl.load(table + STRIDE * n_chunks + c).to(tl.int32)
        base = (tl.load(bracket + 2 * window) << TOP).to(tl.int32)
        top = ((last << TOP) + 0xFFFF).to(tl.int32)
        shift = tl.load(pools + SHIFT * n_pools + pool).to(tl.int32)
        bins = hist + tl.load(pools + OFFSET * n_pools + pool)
        above = tl.zeros((TILE // LANE,), tl.int32)
        inside = tl.zeros((TILE // LANE,), tl.int32)
        bad = tl.zeros((TILE // LANE,), tl.int32)
        local = tl.zeros((BINS,), tl.int32)
        counted = length
        if tl.load(table + FULL * n_chunks + c) != 0:
            for start in range(0, CHUNK, TILE):
                offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
                above, inside, bad, local = window_tile(
                    address,
                    offs,
                    offs >= 0,
                    base,
                    top,
                    shift,
                    bins,
                    above,
                    inside,
                    bad,
                    local,
                    KIND,
                    TILE,
                    LANE,
                    BINS,
                    True,
                )
        else:
            counted = (length + TILE - 1) // TILE * TILE
            for start in range(0, length, TILE):
                offs = start + tl.arange(0, TILE)
                above, inside, bad, local = window_tile(
                    address,
                    offs * stride,
                    offs < length,
                    base,
                    top,
                    shift,
                    bins,
                    above,
                    inside,
                    bad,
                    local,
                    KIND,
                    TILE,
                    LANE,
                    BINS,
                    False,
                )
        n_inside = tl.sum(inside, 0)
        tl.atomic_add(counters + 3 * window, tl.sum(above, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + 3 * window + 1, n_inside.to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + 3 * window + 2, tl.sum(bad, 0).to(tl.int64), sem="relaxed")
        if KIND != 0:
            b = tl.arange(0, BINS)
            local -= tl.where(b == 0, counted - n_inside, 0)
            where = bins + ((b << (16 if KIND == 2 else 13)) >> shift)
            tl.atomic_add(where, local, mask=local > 0, sem="relaxed")


@kernel
def fold_kernel(pools, n_pools, members, hist, partial, WIDTH: tl.constexpr):
    """Sum the counts of each FOLD bins of a window."""
    w = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pool = tl.load(members + w)
    n_bins = (WIDTH * 65536) >> tl.load(pools + SHIFT * n_pools + pool)
    bins = part * FOLD + tl.arange(0, FOLD)
    start = hist + tl.load(pools + OFFSET * n_pools + pool)
    counts = tl.load(start + bins, mask=bins < n_bins, other=0).to(tl.int64)
    tl.store(partial + w * FOLDS + part, tl.sum(counts, 0))


@kernel
def settle_kernel(
    pools,
    n_pools,
    members,
    bracket,
    counters,
    hist,
    partial,
    keys,
    done,
    settled,
    WIDTH: tl.constexpr,
):
    """Verify the window; if it holds the rank, find the key in it."""
    w = tl.program_id(0).to(tl.int64)
    pool = tl.load(members + w)
    k = tl.load(pools + RANK * n_pools + pool)
    shift = tl.load(pools + SHIFT * n_pools + pool)
    above = tl.load(counters + 3 * w)
    inside = tl.load(counters + 3 * w + 1)
    lowest = tl.load(bracket + 2 * w)
    last = tl.load(bracket + 2 * w + 1)
    parts = tl.arange(0, FOLDS)
    sums = tl.load(partial + w * FOLDS + parts)
    # the sum shows if a 32-bit bin overflowed
    if (last >= 0) & (tl.sum(sums, 0) == inside) & (above < k):
        if k <= above + inside:
            part, rank = find(sums, parts, k - above)
            n_bins = (WIDTH * 65536) >> shift
            inner = tl.arange(0, FOLD)
            bins = part * FOLD + inner
            start = hist + tl.load(pools + OFFSET * n_pools + pool)
            counts = tl.load(start + bins, mask=bins < n_bins, other=0).to(tl.int64)
            found, _ = find(counts, inner, rank)
            key = (lowest << TOP) + ((part * FOLD + found).to(tl.int64) << shift)
            tl.store(keys + pool, key)
            tl.store(done + pool, 1)
            tl.atomic_add(settled, 1, sem="relaxed")
        elif lowest == 0:  # only zeros are left
            tl.store(keys + pool, lowest)
            tl.store(done + pool, 1)
            tl.atomic_add(settled, 1, sem="relaxed")
