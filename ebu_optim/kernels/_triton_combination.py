"""Steps 2 to 5 of method.md on the device, in one pass over all columns, in place.

The steps follow `reference.combine` on one tile each. Sums are kept per thread (`by_thread`) and
added up at the end of the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_parts import (
    INF,
    by_thread,
    kernel,
    load_float,
    magnitude,
    round_to,
    store,
    stored_value,
)

# columns: rows of addresses in the combination's table, and places in KINDS and STRIDES
THETA = tl.constexpr(0)
F = tl.constexpr(1)
R = tl.constexpr(2)
ANCHOR = tl.constexpr(3)
FISHER = tl.constexpr(4)
OUT = tl.constexpr(5)
HELD = tl.constexpr(6)
# the table's other rows; it is [11, chunks] int64
LENGTH = tl.constexpr(7)
KEY_F = tl.constexpr(8)
KEY_R = tl.constexpr(9)
STRIDES = tl.constexpr(10)  # bit j: column j is not one expanded value; bit 7: FULL


@triton.jit
def mixed(g_f, g_r, m_f, both, only_r, on_f, on_r, on_m, on_only_r, blend):
    """G without the penalty, see `contract.Weights`."""
    out = on_f * g_f + on_r * g_r
    out = out + on_m * m_f * g_f
    out = out + on_only_r * only_r * g_r
    out = out + -blend * both * g_f
    return out + blend * both * g_r


@triton.jit
def online_fisher(fisher, g_r, online):
    """F + online (g_r^2 - F), as in torch.lerp."""
    step = g_r * g_r - fisher
    if online < 0.5:
        new = fisher + online * step
    else:
        new = g_r * g_r - step * (1.0 - online)
    return new


@triton.jit
def put(
    row,
    n_chunks,
    counts,
    more,
    wrong,
    dot,
    f_sq,
    r_sq,
    g_sq,
    moved_f,
    moved_r,
    moved_both,
    moved_rest,
    fisher_sum,
):
    """Store the chunk's sums in the order of `contract.STATS`."""
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


@triton.jit
def read(
    address,
    strides,
    offs,
    mask,
    KINDS: tl.constexpr,
    COLUMN: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """Load one tile of a column."""
    if not IS_FULL:
        offs = offs * ((strides >> COLUMN) & 1)
    return load_float(address, offs, mask, KINDS // 4**COLUMN % 4, IS_FULL)


@triton.jit
def no_sums(SIZE: tl.constexpr):
    """The sums over no elements: three of integers, nine of floats."""
    none = tl.zeros((SIZE,), tl.int32)
    zero = tl.zeros((SIZE,), tl.float32)
    return none, none, none, zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def combine_chunk(
    column,
    n_chunks,
    length,
    strides,
    tau_f,
    tau_r,
    on_f,
    on_r,
    on_m,
    on_only_r,
    blend,
    gamma,
    online,
    inv_scale,
    KINDS: tl.constexpr,
    PENALTY: tl.constexpr,
    TILE: tl.constexpr,
    LANE: tl.constexpr,
    IS_FULL: tl.constexpr,
):
    """`reference.combine` on one chunk, in the same order of operations; returns the sums."""
    # each is a KIND, or 3 if the column is missing
    ANCHOR_KIND: tl.constexpr = KINDS // 4**ANCHOR % 4
    FISHER_KIND: tl.constexpr = KINDS // 4**FISHER % 4
    OUT_KIND: tl.constexpr = KINDS // 4**OUT % 4
    HELD_KIND: tl.constexpr = KINDS // 4**HELD % 4
    theta_at = tl.load(column + THETA * n_chunks)
    f_at = tl.load(column + F * n_chunks)
    r_at = tl.load(column + R * n_chunks)
    anchor_at = tl.load(column + ANCHOR * n_chunks)
    fisher_at = tl.load(column + FISHER * n_chunks)
    out_at = tl.load(column + OUT * n_chunks)
    held_at = tl.load(column + HELD * n_chunks)
    (
        counts,
        more,
        wrong,
        dot,
        f_sq,
        r_sq,
        g_sq,
        moved_f,
        moved_r,
        moved_both,
        moved_rest,
        fisher_sum,
    ) = no_sums(TILE // LANE)
    for start in range(0, length, TILE):
        offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
        mask = offs < length
        g_f = read(f_at, strides, offs, mask, KINDS, F, IS_FULL)
        g_r = read(r_at, strides, offs, mask, KINDS, R, IS_FULL)
        m_f = (magnitude(g_f) >= tau_f).to(tl.float32)
        m_r = (magnitude(g_r) >= tau_r).to(tl.float32)
        opposed = (g_f.to(tl.int32, bitcast=True) ^ g_r.to(tl.int32, bitcast=True)) < 0
        if inv_scale is not None:
            g_f = g_f * inv_scale
            g_r = g_r * inv_scale
        both = m_f * m_r
        only_r = m_r - both
        out = mixed(g_f, g_r, m_f, both, only_r, on_f, on_r, on_m, on_only_r, blend)
        if (ANCHOR_KIND < 3) or (HELD_KIND < 3):
            theta = read(theta_at, strides, offs, mask, KINDS, THETA, IS_FULL)
        if FISHER_KIND < 3:
            fisher = read(fisher_at, strides, offs, mask, KINDS, FISHER, IS_FULL)
        if ANCHOR_KIND < 3:
            moved = theta - read(anchor_at, strides, offs, mask, KINDS, ANCHOR, IS_FULL)
            square = moved * moved
            moved_f += by_thread(square * (m_f - both), LANE)
            moved_r += by_thread(square * only_r, LANE)
            moved_both += by_thread(square * both, LANE)
            moved_rest += by_thread(square * ((1.0 - m_f) * (1.0 - m_r)), LANE)
            if PENALTY != "none":  # p of eqs. 8 and 9
                p = moved * fisher * gamma
                if PENALTY == "partial":
                    p = only_r * p
                out = out + p
        rounded = round_to(out, OUT_KIND)
        wrong += by_thread((magnitude(stored_value(rounded, OUT_KIND)) >= INF).to(tl.int32), LANE)
        # two counts in one integer, of at most CHUNK / TILE * LANE < 2**15 each
        counts += by_thread(m_f.to(tl.int32) + (m_r.to(tl.int32) << 16), LANE)
        opposed = opposed & (both > 0)
        more += by_thread(both.to(tl.int32) + (opposed.to(tl.int32) << 16), LANE)
        dot += by_thread(g_f * g_r, LANE)
        f_sq += by_thread(g_f * g_f, LANE)
        r_sq += by_thread(g_r * g_r, LANE)
        g_sq += by_thread(out * out, LANE)
        if (online is not None) and (FISHER_KIND < 3):
            kept = round_to(online_fisher(fisher, g_r, online), FISHER_KIND)
            fisher_sum += by_thread(stored_value(kept, FISHER_KIND), LANE)
            store(fisher_at, offs, mask, kept, FISHER_KIND, IS_FULL)
        if HELD_KIND < 3:
            held = tl.where(m_f + m_r > 0, float("nan"), theta)
            store(held_at, offs, mask, round_to(held, HELD_KIND), HELD_KIND, IS_FULL)
        store(out_at, offs, mask, rounded, OUT_KIND, IS_FULL)
    return (
        counts,
        more,
        wrong,
        dot,
        f_sq,
        r_sq,
        g_sq,
        moved_f,
        moved_r,
        moved_both,
        moved_rest,
        fisher_sum,
    )


@kernel
def combine_kernel(
    table,
    n_chunks,
    first,
    keys,
    on_f,
    on_r,
    on_m,
    on_only_r,
    blend,
    gamma,
    online,
    inv_scale,
    partial,
    KINDS: tl.constexpr,
    PENALTY: tl.constexpr,
    GAMMA_AT: tl.constexpr,
    ONLINE_AT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    LANE: tl.constexpr,
):
    """Steps 2 to 5 of method.md on one chunk, in place; its sums go to `partial`, [14, chunks].

    Digit j of KINDS, to base 4, is the KIND of column j, or 3 if the column is missing. gamma and
    online are numbers, or with GAMMA_AT and ONLINE_AT pointers to a number, like inv_scale. online
    and inv_scale may be None.
    """
    c = (first + tl.program_id(0)).to(tl.int64)
    column = table + c
    length = tl.load(column + LENGTH * n_chunks).to(tl.int32)
    strides = tl.load(column + STRIDES * n_chunks).to(tl.int32)
    # zeros are never selected
    tau_f = tl.maximum(tl.load(keys + tl.load(column + KEY_F * n_chunks)), 1).to(tl.int32)
    tau_r = tl.maximum(tl.load(keys + tl.load(column + KEY_R * n_chunks)), 1).to(tl.int32)
    if GAMMA_AT:
        gamma = tl.load(gamma).to(tl.float32)
    if ONLINE_AT:
        online = tl.load(online).to(tl.float32)
    if inv_scale is not None:
        inv_scale = tl.load(inv_scale).to(tl.float32)
    # Triton would choose its own order for values that are made only in the branches, and with that
    # order some cards need more registers.
    (
        counts,
        more,
        wrong,
        dot,
        f_sq,
        r_sq,
        g_sq,
        moved_f,
        moved_r,
        moved_both,
        moved_rest,
        fisher_sum,
    ) = no_sums(TILE // LANE)
    if (strides & 128) != 0:
        (
            counts,
            more,
            wrong,
            dot,
            f_sq,
            r_sq,
            g_sq,
            moved_f,
            moved_r,
            moved_both,
            moved_rest,
            fisher_sum,
        ) = combine_chunk(
            column,
            n_chunks,
            CHUNK,
            strides,
            tau_f,
            tau_r,
            on_f,
            on_r,
            on_m,
            on_only_r,
            blend,
            gamma,
            online,
            inv_scale,
            KINDS,
            PENALTY,
            TILE,
            LANE,
            True,
        )
    else:
        (
            counts,
            more,
            wrong,
            dot,
            f_sq,
            r_sq,
            g_sq,
            moved_f,
            moved_r,
            moved_both,
            moved_rest,
            fisher_sum,
        ) = combine_chunk(
            column,
            n_chunks,
            length,
            strides,
            tau_f,
            tau_r,
            on_f,
            on_r,
            on_m,
            on_only_r,
            blend,
            gamma,
            online,
            inv_scale,
            KINDS,
            PENALTY,
            TILE,
            LANE,
            False,
        )
    put(
        partial + c,
        n_chunks,
        counts,
        more,
        wrong,
        dot,
        f_sq,
        r_sq,
        g_sq,
        moved_f,
        moved_r,
        moved_both,
        moved_rest,
        fisher_sum,
    )


@kernel
def reduce_kernel(partial, n_chunks, stats, BLOCK: tl.constexpr):
    """stats[i] += the sum of row i of `partial`, always in the same order."""
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_chunks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i * n_chunks + offs, mask=offs < n_chunks, other=0.0)
    tl.store(stats + i, tl.load(stats + i) + tl.sum(total, 0))


@triton.jit
def restore_tile(
    theta_at, held_at, strides, offs, mask, KINDS: tl.constexpr, IS_FULL: tl.constexpr
):
    theta = load_float(theta_at, offs, mask, KINDS % 4, IS_FULL)
    held = read(held_at, strides, offs, mask, KINDS, HELD, IS_FULL)
    kept = round_to(tl.where(held == held, held, theta), KINDS % 4)
    store(theta_at, offs, mask, kept, KINDS % 4, IS_FULL)


@kernel
def restore_kernel(
    table, n_chunks, first, KINDS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Restore what `combine_kernel` held: theta = held where held is not NaN."""
    column = table + (first + tl.program_id(0)).to(tl.int64)
    theta_at = tl.load(column + THETA * n_chunks)
    held_at = tl.load(column + HELD * n_chunks)
    length = tl.load(column + LENGTH * n_chunks).to(tl.int32)
    strides = tl.load(column + STRIDES * n_chunks).to(tl.int32)
    if (strides & 128) != 0:
        for start in range(0, CHUNK, TILE):
            offs = tl.multiple_of(start, 16) + tl.arange(0, TILE)
            restore_tile(theta_at, held_at, strides, offs, offs >= 0, KINDS, True)
    else:
        for start in range(0, length, TILE):
            offs = start + tl.arange(0, TILE)
            restore_tile(theta_at, held_at, strides, offs, offs < length, KINDS, False)
