"""The Triton kernels behind `triton.py`; their tables are made by `_tables.py`.

Every kernel walks over chunks of many tensors at once: a table holds the address, the length and
the pool of each, so that the number of launches does not depend on the number of tensors. Addresses
are 64-bit integers made on the host; offsets inside a chunk fit 32 bits.

A chunk is read in tiles. A full chunk whose columns are dense and lie on 16-byte boundaries is read
without masks, which is what makes the loads and stores 16 bytes wide; any other chunk is masked.

Floats are told apart by KIND: 0 float32, 1 float16, 2 bfloat16. bfloat16 is taken apart by integer
operations: the oldest cards have no instructions for it.

Keys are magnitude bits in float32, int32, as in `reference`. All counts are integers and all float
sums are made in a fixed order, so that nothing depends on the order in which blocks run.

tl.histogram had wrong counts on inputs laid out by tl.dot or a reduction (triton#6987); here its
input comes from loads, a tile has at least as many elements as the block has threads, and none of
its bins is left out of range: what is not to be counted goes to bin 0 and is subtracted again.
"""

from __future__ import annotations

import triton
import triton.language as tl

# rows of the selection's table, [5, chunks] int64
ADDRESS = tl.constexpr(0)
LENGTH = tl.constexpr(1)
POOL = tl.constexpr(2)
STRIDE = tl.constexpr(3)  # 1, or 0: one value expanded
FULL = tl.constexpr(4)  # the unmasked branch may be taken

# rows of the pools' table, [6, pools] int64
SIZE = tl.constexpr(0)
RANK = tl.constexpr(1)
WINDOW = tl.constexpr(2)  # its index among the pools that have a window, or -1
SHIFT = tl.constexpr(3)  # low bits that are zero in all its keys
OFFSET = tl.constexpr(4)  # of its bins among all windows' bins
SAMPLES = tl.constexpr(5)

# rows of the combination's table: 7 addresses, then these, [11, chunks] int64
C_LENGTH = tl.constexpr(7)
C_KEY_F = tl.constexpr(8)
C_KEY_R = tl.constexpr(9)
C_STRIDES = tl.constexpr(10)  # bit j: column j is not one expanded value; bit 7: FULL

# One binary for each set of constants: Triton would compile others for numbers that are 1 or
# multiples of 16, and for pointers on 16-byte boundaries. Where alignment counts, it is in the
# tables. (Functions that are not launched need none of this.)
kernel = triton.jit(
    do_not_specialize=[
        "table", "n_chunks", "first", "count", "pools", "n_pools", "members", "samples", "bracket",
        "counters", "hist", "partial", "keys", "done", "settled", "nonfinite", "prefix", "bits",
        "gamma", "online", "inv_scale", "stats",
    ]
)  # fmt: skip

INF = tl.constexpr(0x7F800000)
TOP = tl.constexpr(16)  # a window is made of whole bins of the keys' upper 15 bits
DIGIT_BINS = tl.constexpr(256)
LEVELS = tl.constexpr(4)  # 8 + 8 + 8 + 7 bits
FOLD = tl.constexpr(4096)  # bins of a window that one program adds up
FOLDS = tl.constexpr(256)


# -- loads and stores -----------------------------------------------------------------------------


@triton.jit
def load_float(address, offs, mask, KIND: tl.constexpr, IS_FULL: tl.constexpr):
    """float32 values at `address`, whose elements are of KIND."""
    if KIND == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        p = address.to(tl.pointer_type(tl.float16))
    else:
        p = address.to(tl.pointer_type(tl.int16))
    if IS_FULL:
        x = tl.load(tl.multiple_of(p, 16) + offs)
    else:
        x = tl.load(p + offs, mask=mask, other=0)
    if KIND == 2:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, KIND: tl.constexpr):
    """x as stored: float32, float16, or the bits of bfloat16 (to the nearest even) as int16."""
    if KIND == 0:
        y = x
    elif KIND == 1:
        y = x.to(tl.float16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    return y


@triton.jit
def stored_value(y, KIND: tl.constexpr):
    """The float32 value of what `round_to` made."""
    if KIND == 2:
        x = (y.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = y.to(tl.float32)
    return x


@triton.jit
def store(address, offs, mask, y, KIND: tl.constexpr, IS_FULL: tl.constexpr):
    if KIND == 0:
        p = address.to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        p = address.to(tl.pointer_type(tl.float16))
    else:
        p = address.to(tl.pointer_type(tl.int16))
    if IS_FULL:
        tl.store(tl.multiple_of(p, 16) + offs, y)
    else:
        tl.store(p + offs, y, mask=mask)


@triton.jit
def magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def by_thread(x, TILE: tl.constexpr, LANE: tl.constexpr):
    """Sums of LANE neighbours, which lie in one thread: sums over tiles take few registers then."""
    if LANE == 1:
        y = x
    else:
        y = tl.sum(tl.reshape(x, (TILE // LANE, LANE)), 1)
    return y


@triton.jit
def find(counts, bins, rank):
    """The bin of the element of that rank from the top, and its rank inside that bin.

    counts: of bins 0, 1, ... `bins`; 1 <= rank <= their sum.
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
    """Count the upper 15 bits of some keys of every chunk, drawn by a hash of fixed seed.

    A chunk gives its share of the pool's SAMPLES, rounded at random.
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
    """The bin of the sample's element of that rank from the top; `sums` are of 128 bins each."""
    row, left = find(sums, rows, rank)
    cells = tl.arange(0, 128)
    cell, _ = find(tl.load(start + row * 128 + cells), cells, left)
    return row * 128 + cell


@kernel
def bracket_kernel(pools, n_pools, members, samples, bracket, WIDTH: tl.constexpr):
    """From a sample to the window: the first and last of at most WIDTH bins that hold the rank.

    It is 4.5 standard deviations wide to either side, or WIDTH bins round the guess where that is
    less. A window that would hold a quarter of all elements is refused (last = -1): then the
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
    # zeros, in bin 0, are not incremented for
    bins = lowest + tl.arange(0, WIDTH)
    inside = tl.sum(tl.load(start + bins, mask=(bins <= highest) & (bins > 0), other=0), 0)
    if (shift == 0) & (inside * 4 > total):
        highest = lowest * 0 - 1
    tl.store(bracket + 2 * w, lowest.to(tl.int64))
    tl.store(bracket + 2 * w + 1, highest.to(tl.int64))


# -- selection: one pass --------------------------------------------------------------------------


@triton.jit
def window_tile(
    address, offs, mask, base, top, shift, hist, above, inside, bad, local,
    KIND: tl.constexpr, TILE: tl.constexpr, LANE: tl.constexpr, BINS: tl.constexpr,
    IS_FULL: tl.constexpr,
):  # fmt: skip
    u = magnitude(load_float(address, offs, mask, KIND, IS_FULL))
    within = (u >= base) & (u <= top) & (u != 0)
    above += by_thread((u > top).to(tl.int32), TILE, LANE)
    inside += by_thread(within.to(tl.int32), TILE, LANE)
    bad += by_thread((u >= INF).to(tl.int32), TILE, LANE)
    if KIND == 0:
        one = tl.full((TILE,), 1, tl.int32)
        tl.atomic_add(hist + ((u - base) >> shift), one, mask=within, sem="relaxed")
    else:  # few different keys: count here, or the increments would queue
        local += tl.histogram(tl.where(within, (u - base) >> (16 if KIND == 2 else 13), 0), BINS)
    return above, inside, bad, local


@kernel
def window_kernel(
    table, n_chunks, first, pools, n_pools, bracket, counters, hist,
    KIND: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, LANE: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
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
                    address, offs, offs >= 0, base, top, shift, bins, above, inside, bad, local,
                    KIND, TILE, LANE, BINS, True,
                )  # fmt: skip
        else:
            counted = (length + TILE - 1) // TILE * TILE
            for start in range(0, length, TILE):
                offs = start + tl.arange(0, TILE)
                above, inside, bad, local = window_tile(
                    address, offs * stride, offs < length, base, top, shift, bins, above, inside,
                    bad, local, KIND, TILE, LANE, BINS, False,
                )  # fmt: skip
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
    """Sums over FOLD bins of a window each."""
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
    pools, n_pools, members, bracket, counters, hist, partial, keys, done, settled,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Verify the window; where it held the rank, find the key in it."""
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
    # a 32-bit bin that overflowed shows in the sum
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
        elif lowest == 0:  # all that is left are zeros
            tl.store(keys + pool, lowest)
            tl.store(done + pool, 1)
            tl.atomic_add(settled, 1, sem="relaxed")


# -- selection: radix -----------------------------------------------------------------------------


@triton.jit
def digit_tile(
    address, offs, mask, prefix, counts, unwanted,
    KIND: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
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
    table, n_chunks, c, prefix,
    KIND: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """How many keys of chunk c that begin with `prefix` have each digit."""
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
                address, offs * stride, offs < length, prefix, counts, unwanted,
                KIND, LOW, BITS, False,
            )  # fmt: skip
    return counts - tl.where(tl.arange(0, 1 << BITS) == 0, tl.sum(unwanted, 0), 0)


@triton.jit
def prefix_of(hist, pool, rank, LEVEL: tl.constexpr):
    """The key's first LEVEL digits, found in the counts of the levels before, and the rank left."""
    bins = tl.arange(0, DIGIT_BINS)
    prefix = tl.zeros((), tl.int64)
    for level in tl.static_range(LEVEL):
        counts = tl.load(hist + (pool * LEVELS + level) * DIGIT_BINS + bins).to(tl.int64)
        digit, rank = find(counts, bins, rank)
        prefix = (prefix << (7 if level == 3 else 8)) | digit
    return prefix, rank


@kernel
def digit_kernel(
    table, n_chunks, first, count, pools, n_pools, hist, done, settled,
    KIND: tl.constexpr, LEVEL: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One level of the radix selection, for the pools that no window settled.

    It is launched always, and leaves at once where there are none: the host need not know.
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
    """Write every pool's key, at most that of Inf plus 1, and its number of NaN and Inf."""
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
    table, n_chunks, first, prefix, hist,
    KIND: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
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
    """Set `bits` to those of a float32 NaN where one element of the chunk is NaN or Inf."""
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


# -- combination ----------------------------------------------------------------------------------


@triton.jit
def combine_tile(
    theta_at, f_at, r_at, anchor_at, fisher_at, out_at, held_at,
    offs, mask, on_theta, on_f, on_r, on_anchor, on_fisher,
    tau_f, tau_r, second, third, blend, gamma, online, inv_scale,
    counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both, moved_rest,
    fisher_sum,
    THETA: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ANCHOR: tl.constexpr,
    FISHER: tl.constexpr, OUT: tl.constexpr, HELD: tl.constexpr, ROUTED: tl.constexpr,
    FIRST: tl.constexpr, PENALTY: tl.constexpr, ONLINE: tl.constexpr, SCALED: tl.constexpr,
    TILE: tl.constexpr, LANE: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    """`reference.combine` on one tile, in its order of operations."""
    g_f = load_float(f_at, offs * on_f, mask, F, IS_FULL)
    g_r = load_float(r_at, offs * on_r, mask, R, IS_FULL)
    m_f = (magnitude(g_f) >= tau_f).to(tl.float32)
    m_r = (magnitude(g_r) >= tau_r).to(tl.float32)
    opposed = (g_f.to(tl.int32, bitcast=True) ^ g_r.to(tl.int32, bitcast=True)) < 0
    if SCALED:
        g_f = g_f * inv_scale
        g_r = g_r * inv_scale
    both = m_f * m_r
    only_r = m_r - both
    if ROUTED:
        out = m_f * g_f
        out = out + only_r * g_r
    else:
        if FIRST:
            out = g_f + g_r * second
        else:
            out = g_r * second
        out = out + third * m_f * g_f
    out = out + -blend * both * g_f
    out = out + blend * both * g_r
    if (ANCHOR >= 0) or (HELD >= 0):
        theta = load_float(theta_at, offs * on_theta, mask, THETA, IS_FULL)
    if FISHER >= 0:
        fisher = load_float(fisher_at, offs * on_fisher, mask, FISHER, IS_FULL)
    if ANCHOR >= 0:
        moved = theta - load_float(anchor_at, offs * on_anchor, mask, ANCHOR, IS_FULL)
        square = moved * moved
        moved_f += by_thread(square * (m_f - both), TILE, LANE)
        moved_r += by_thread(square * only_r, TILE, LANE)
        moved_both += by_thread(square * both, TILE, LANE)
        moved_rest += by_thread(square * ((1.0 - m_f) * (1.0 - m_r)), TILE, LANE)
        if PENALTY > 0:
            p = moved * fisher * gamma
            if PENALTY == 1:
                out = out + only_r * p
            else:
                out = out + p
    rounded = round_to(out, OUT)
    wrong += by_thread((magnitude(stored_value(rounded, OUT)) >= INF).to(tl.int32), TILE, LANE)
    # two counts in one integer, of at most CHUNK / TILE * LANE < 2**15 each
    counts += by_thread(m_f.to(tl.int32) + (m_r.to(tl.int32) << 16), TILE, LANE)
    opposed = opposed & (both > 0)
    more += by_thread(both.to(tl.int32) + (opposed.to(tl.int32) << 16), TILE, LANE)
    dot += by_thread(g_f * g_r, TILE, LANE)
    f_sq += by_thread(g_f * g_f, TILE, LANE)
    r_sq += by_thread(g_r * g_r, TILE, LANE)
    g_sq += by_thread(out * out, TILE, LANE)
    if ONLINE > 0:
        step = g_r * g_r - fisher
        if online < 0.5:  # as torch.lerp has it
            new = fisher + online * step
        else:
            new = g_r * g_r - step * (1.0 - online)
        kept = round_to(new, FISHER)
        fisher_sum += by_thread(stored_value(kept, FISHER), TILE, LANE)
        store(fisher_at, offs, mask, kept, FISHER, IS_FULL)
    if HELD >= 0:
        kept = tl.where(m_f + m_r > 0, float("nan"), theta)
        store(held_at, offs, mask, round_to(kept, HELD), HELD, IS_FULL)
    store(out_at, offs, mask, rounded, OUT, IS_FULL)
    return (
        counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both, moved_rest,
        fisher_sum,
    )  # fmt: skip


@kernel
def combine_kernel(
    table, n_chunks, first, keys, second, third, blend, gamma, online, inv_scale, partial,
    THETA: tl.constexpr, F: tl.constexpr, R: tl.constexpr, ANCHOR: tl.constexpr,
    FISHER: tl.constexpr, OUT: tl.constexpr, HELD: tl.constexpr, ROUTED: tl.constexpr,
    FIRST: tl.constexpr, PENALTY: tl.constexpr, ONLINE: tl.constexpr, SCALED: tl.constexpr,
    GAMMA_AT: tl.constexpr, ONLINE_AT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    LANE: tl.constexpr,
):  # fmt: skip
    """Steps 2 to 5 of method.md on one chunk, in place; its sums go to `partial`, [14, chunks].

    THETA ... HELD are KINDs, or -1 where a column is missing. PENALTY: 0 none, 1 partial, 2 full.
    gamma and online are numbers, or with GAMMA_AT, ONLINE_AT pointers to one.
    """
    c = (first + tl.program_id(0)).to(tl.int64)
    column = table + c
    theta_at = tl.load(column)
    f_at = tl.load(column + 1 * n_chunks)
    r_at = tl.load(column + 2 * n_chunks)
    anchor_at = tl.load(column + 3 * n_chunks)
    fisher_at = tl.load(column + 4 * n_chunks)
    out_at = tl.load(column + 5 * n_chunks)
    held_at = tl.load(column + 6 * n_chunks)
    length = tl.load(column + C_LENGTH * n_chunks).to(tl.int32)
    # zeros are never selected
    tau_f = tl.maximum(tl.load(keys + tl.load(column + C_KEY_F * n_chunks)), 1).to(tl.int32)
    tau_r = tl.maximum(tl.load(keys + tl.load(column + C_KEY_R * n_chunks)), 1).to(tl.int32)
    strides = tl.load(column + C_STRIDES * n_chunks).to(tl.int32)
    if GAMMA_AT:
        gamma = tl.load(gamma).to(tl.float32)
    if ONLINE_AT:
        online = tl.load(online).to(tl.float32)
    if SCALED:
        inv_scale = tl.load(inv_scale).to(tl.float32)

    counts = tl.zeros((TILE // LANE,), tl.int32)
    more = tl.zeros((TILE // LANE,), tl.int32)
    wrong = tl.zeros((TILE // LANE,), tl.int32)
    dot = tl.zeros((TILE // LANE,), tl.float32)
    f_sq = tl.zeros((TILE // LANE,), tl.float32)
    r_sq = tl.zeros((TILE // LANE,), tl.float32)
    g_sq = tl.zeros((TILE // LANE,), tl.float32)
    moved_f = tl.zeros((TILE // LANE,), tl.float32)
    moved_r = tl.zeros((TILE // LANE,), tl.float32)
    moved_both = tl.zeros((TILE // LANE,), tl.float32)
    moved_rest = tl.zeros((TILE // LANE,), tl.float32)
    fisher_sum = tl.zeros((TILE // LANE,), tl.float32)
    if (strides & 128) != 0:
        for start in range(0, CHUNK, TILE):
            offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
            (
                counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both,
                moved_rest, fisher_sum,
            ) = combine_tile(
                theta_at, f_at, r_at, anchor_at, fisher_at, out_at, held_at,
                offs, offs >= 0, 1, 1, 1, 1, 1,
                tau_f, tau_r, second, third, blend, gamma, online, inv_scale,
                counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both,
                moved_rest, fisher_sum,
                THETA, F, R, ANCHOR, FISHER, OUT, HELD, ROUTED, FIRST, PENALTY, ONLINE, SCALED,
                TILE, LANE, True,
            )  # fmt: skip
    else:
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            (
                counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both,
                moved_rest, fisher_sum,
            ) = combine_tile(
                theta_at, f_at, r_at, anchor_at, fisher_at, out_at, held_at,
                offs, offs < length, strides & 1, (strides >> 1) & 1, (strides >> 2) & 1,
                (strides >> 3) & 1, (strides >> 4) & 1,
                tau_f, tau_r, second, third, blend, gamma, online, inv_scale,
                counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both,
                moved_rest, fisher_sum,
                THETA, F, R, ANCHOR, FISHER, OUT, HELD, ROUTED, FIRST, PENALTY, ONLINE, SCALED,
                TILE, LANE, False,
            )  # fmt: skip
    # in the order of `reference.STATS`
    row = partial + c
    tl.store(row, tl.sum(counts & 0xFFFF, 0).to(tl.float64))
    tl.store(row + 1 * n_chunks, tl.sum(counts >> 16, 0).to(tl.float64))
    tl.store(row + 2 * n_chunks, tl.sum(more & 0xFFFF, 0).to(tl.float64))
    tl.store(row + 3 * n_chunks, tl.sum(more >> 16, 0).to(tl.float64))
    tl.store(row + 4 * n_chunks, tl.sum(dot, 0).to(tl.float64))
    tl.store(row + 5 * n_chunks, tl.sum(f_sq, 0).to(tl.float64))
    tl.store(row + 6 * n_chunks, tl.sum(r_sq, 0).to(tl.float64))
    tl.store(row + 7 * n_chunks, tl.sum(g_sq, 0).to(tl.float64))
    tl.store(row + 8 * n_chunks, tl.sum(moved_f, 0).to(tl.float64))
    tl.store(row + 9 * n_chunks, tl.sum(moved_r, 0).to(tl.float64))
    tl.store(row + 10 * n_chunks, tl.sum(moved_both, 0).to(tl.float64))
    tl.store(row + 11 * n_chunks, tl.sum(moved_rest, 0).to(tl.float64))
    tl.store(row + 12 * n_chunks, tl.sum(fisher_sum, 0).to(tl.float64))
    tl.store(row + 13 * n_chunks, tl.sum(wrong, 0).to(tl.float64))


@kernel
def reduce_kernel(partial, n_chunks, stats, BLOCK: tl.constexpr):
    """stats[i] += the sum of row i of `partial`, in one order always."""
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_chunks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i * n_chunks + offs, mask=offs < n_chunks, other=0.0)
    tl.store(stats + i, tl.load(stats + i) + tl.sum(total, 0))


@kernel
def restore_kernel(
    table, n_chunks, first,
    THETA: tl.constexpr, HELD: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Put back what `combine_kernel` held: theta = held where held is not NaN."""
    c = (first + tl.program_id(0)).to(tl.int64)
    theta_at = tl.load(table + c)
    held_at = tl.load(table + c + 6 * n_chunks)
    length = tl.load(table + c + C_LENGTH * n_chunks).to(tl.int32)
    strides = tl.load(table + c + C_STRIDES * n_chunks).to(tl.int32)
    if (strides & 128) != 0:
        for start in range(0, CHUNK, TILE):
            offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
            theta = load_float(theta_at, offs, offs >= 0, THETA, True)
            held = load_float(held_at, offs, offs >= 0, HELD, True)
            kept = round_to(tl.where(held == held, held, theta), THETA)
            store(theta_at, offs, offs >= 0, kept, THETA, True)
    else:
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            theta = load_float(theta_at, offs, offs < length, THETA, False)
            held = load_float(held_at, offs * ((strides >> 6) & 1), offs < length, HELD, False)
            kept = round_to(tl.where(held == held, held, theta), THETA)
            store(theta_at, offs, offs < length, kept, THETA, False)
