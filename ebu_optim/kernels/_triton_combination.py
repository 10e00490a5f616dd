"""Steps 2 to 5 of method.md on the device, in one pass over all columns, in place.

The steps follow `reference.combine` on one tile each; sums are kept by thread (`by_thread`) and
added up when the chunk is done.
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

# rows of the combination's table: 7 addresses, then these, [11, chunks] int64
C_LENGTH = tl.constexpr(7)
C_KEY_F = tl.constexpr(8)
C_KEY_R = tl.constexpr(9)
C_STRIDES = tl.constexpr(10)  # bit j: column j is not one expanded value; bit 7: FULL


# -- one tile -------------------------------------------------------------------------------------


@triton.jit
def mixed(
    g_f, g_r, m_f, both, only_r, second, third, blend, ROUTED: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """G without the penalty, see `contract.Weights`."""
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
    return out


@triton.jit
def with_penalty(out, moved, fisher, only_r, gamma, PENALTY: tl.constexpr):
    """G with p of eqs. 8 and 9, on remember-only or everywhere."""
    p = moved * fisher * gamma
    if PENALTY == 1:
        out = out + only_r * p
    else:
        out = out + p
    return out


@triton.jit
def online_fisher(fisher, g_r, online):
    """F + online (g_r^2 - F), as torch.lerp has it."""
    step = g_r * g_r - fisher
    if online < 0.5:
        new = fisher + online * step
    else:
        new = g_r * g_r - step * (1.0 - online)
    return new


@triton.jit
def put(
    row, n_chunks, counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r, moved_both,
    moved_rest, fisher_sum,
):  # fmt: skip
    """Store the chunk's sums, in the order of `contract.STATS`."""
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
def addresses(column, n_chunks):
    """Of theta, g_f, g_r, theta0, F, out and held."""
    return (
        tl.load(column),
        tl.load(column + 1 * n_chunks),
        tl.load(column + 2 * n_chunks),
        tl.load(column + 3 * n_chunks),
        tl.load(column + 4 * n_chunks),
        tl.load(column + 5 * n_chunks),
        tl.load(column + 6 * n_chunks),
    )


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
    out = mixed(g_f, g_r, m_f, both, only_r, second, third, blend, ROUTED, FIRST)
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
            out = with_penalty(out, moved, fisher, only_r, gamma, PENALTY)
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
        kept = round_to(online_fisher(fisher, g_r, online), FISHER)
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
    theta_at, f_at, r_at, anchor_at, fisher_at, out_at, held_at = addresses(column, n_chunks)
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
    put(
        partial + c, n_chunks, counts, more, wrong, dot, f_sq, r_sq, g_sq, moved_f, moved_r,
        moved_both, moved_rest, fisher_sum,
    )  # fmt: skip


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
