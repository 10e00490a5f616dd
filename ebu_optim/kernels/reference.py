"""The plain-torch kernels: exact selection and combination, in chunks of fixed size.

The public functions are the specification of every faster backend: same names, same signatures,
masks equal bit for bit. They run on any device and any floating dtype. Temporaries are bounded
by a constant, never by the number of parameters. On an accelerator they wait for the device.

On a CPU what counts is that a chunk's buffers stay in the cache and that no operation makes or
reads a bool tensor: torch does not vectorise those, and they cost four times what a float costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contract import (
    INF,
    INT,
    MAGNITUDE,
    STATS,
    Columns,
    Update,
    Weights,
    key_bits,
    key_of_inf,
    key_to_value,
    keys,
    working_dtype,
)

__all__ = [
    "STATS",
    "combine",
    "finite_probe",
    "histogram",
    "key_bits",
    "key_of_inf",
    "key_to_value",
    "keys",
    "pieces",
    "restore",
    "scale",
    "select",
    "working_dtype",
]

# One chunk's buffers stay in the caches of a CPU core; an accelerator wants few launches.
CHUNK_CPU = 1 << 19
CHUNK_DEVICE = 1 << 22
# Candidates kept of one bracket, at the most (16 MiB of float32 keys).
CAPACITY = 1 << 22
SAMPLE_MIN, SAMPLE_MAX = 1 << 16, 1 << 20


def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """0 where every element of every tensor is finite, else NaN: 0-d float32 on the device of the
    first; None where there is no element. Waits for no device.

    It is sum(0 * x): 0 * sum(x) would overflow in float16.
    """
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return None
    device = tensors[0].device
    if any(t.device.type != "cpu" for t in tensors):
        # one launch for many tensors; 0 * max|x|
        largest = torch._foreach_norm(tensors, math.inf)
        return torch.stack([x.to(device, torch.float32) for x in largest]).max() * 0
    zeros: dict[torch.dtype, Tensor] = {}
    found = []
    for t in tensors:
        if t.dtype not in zeros:
            zeros[t.dtype] = t.new_zeros(CHUNK_CPU)
        for (x,) in pieces([t]):
            found.append(torch.dot(x.reshape(-1), zeros[t.dtype][: x.numel()]).float())
    return torch.stack(found).sum()


# -- walking over tensors in bounded pieces -----------------------------------------------------


def _dense(t: Tensor) -> bool:
    """Non-overlapping and dense: the elements fill one stretch of memory in some order."""
    expected = 1
    for stride, size in sorted((st, s) for st, s in zip(t.stride(), t.shape) if s > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(columns: Sequence[Tensor]) -> list[Tensor] | None:
    """The columns as 1-d views in memory order, or None where their layouts differ.

    A column whose strides are all 0 (one value, expanded) goes with any layout.
    """
    lead = columns[0]
    contiguous = lead.is_contiguous()
    if not contiguous and not _dense(lead):
        return None
    flat = []
    for c in columns:
        if contiguous and c.is_contiguous():
            flat.append(c.view(-1))
        elif c.stride() == lead.stride():
            flat.append(c.as_strided((c.numel(),), (1,)))
        elif all(st == 0 for st, s in zip(c.stride(), c.shape) if s > 1):
            flat.append(c.as_strided((c.numel(),), (0,)))
        else:
            return None
    return flat


def pieces(columns: Sequence[Tensor], chunk: int | None = None) -> Iterator[Sequence[Tensor]]:
    """Views of the same elements of every column, at most `chunk` of them at a time.

    Columns share one shape; the pieces cover each element once, in an order of no importance.
    """
    lead = columns[0]
    n = lead.numel()
    if chunk is None:
        chunk = CHUNK_CPU if lead.device.type == "cpu" else CHUNK_DEVICE
    if n <= chunk:
        if n:
            yield columns
        return
    flat = _flat(columns)
    if flat is not None:
        yield from zip(*(c.split(chunk) for c in flat), strict=True)
    else:
        axis = max(range(lead.dim()), key=lambda d: lead.shape[d])
        for part in zip(*(c.tensor_split(2, axis) for c in columns), strict=True):
            yield from pieces(part, chunk)


def _packs(
    rows: Sequence[Sequence[Tensor]], tags: Sequence[Any] | None = None
) -> Iterator[tuple[Any, list[Sequence[Tensor]]]]:
    """Pieces gathered into packs of at most one chunk, so that tiny tensors share their calls.

    Yields (tag, pack); the rows of a pack have the same dtypes, devices and tag.
    """
    pack: list[Sequence[Tensor]] = []
    room: int = 0
    kind: list[Any] = [None]
    for i, row in enumerate(rows):
        row_kind = [tags[i] if tags else None, *((t.dtype, t.device) for t in row)]
        for piece in pieces(row):
            n = piece[0].numel()
            if pack and (n > room or kind != row_kind):
                yield kind[0], pack
                pack = []
            if not pack:
                room = CHUNK_CPU if piece[0].device.type == "cpu" else CHUNK_DEVICE
                kind = row_kind
            pack.append(piece)
            room -= n
    if pack:
        yield kind[0], pack


def _parts(
    pack: Sequence[Sequence[Tensor]], row: Tensor
) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Each piece of a pack with its part of a 1-d row."""
    return zip(pack, row.split([piece[0].numel() for piece in pack]), strict=True)


class _Rows:
    """Buffers by name, made once and used again for every chunk: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._rows: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, n: int | None = None) -> Tensor:
        """A 1-d buffer of n elements (as many as `like`) of the device and dtype of `like`; what it
        held before is lost."""
        n = like.numel() if n is None else n
        key = (name, like.device, like.dtype)
        row = self._rows.get(key)
        if row is None or row.numel() < n:
            row = self._rows[key] = torch.empty(n, dtype=like.dtype, device=like.device)
        return row if row.numel() == n else row[:n]


def _column(pack: Sequence[Sequence[Tensor]], j: int, rows: _Rows) -> Tensor:
    """Column j of a pack as one 1-d tensor: a view where the pack is one contiguous piece."""
    if len(pack) == 1:
        return pack[0][j].reshape(-1)
    pieces = [piece[j].reshape(-1) for piece in pack]
    row = rows(f"column {j}", pieces[0], sum(p.numel() for p in pieces))
    return torch.cat(pieces, out=row)


# -- selection ----------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _sample_plan(sizes: tuple[int, ...], count: int) -> tuple[tuple[int, Tensor], ...]:
    """`count` positions drawn iid over the concatenated index space, split by tensor.

    The generator is seeded anew: the draw only guesses a bracket, the result is exact whatever
    it is, so there is no random state to save and the user's stream is untouched.
    """
    offsets = torch.tensor((0, *sizes)).cumsum(0)
    draw = torch.randint(
        int(offsets[-1]), (count,), generator=torch.Generator().manual_seed(0x0EB0)
    )
    draw = draw.sort().values
    cuts = torch.searchsorted(draw, offsets).tolist()
    return tuple((i, draw[a:b] - offsets[i]) for i, (a, b) in enumerate(pairwise(cuts)) if b > a)


def _sample(grads: Sequence[Tensor], count: int, dtype: torch.dtype) -> Tensor:
    """Sorted keys of about `count` elements."""
    parts = []
    for i, index in _sample_plan(tuple(g.numel() for g in grads), count):
        g = grads[i]
        flat, index = _flat([g]), index.to(g.device)
        drawn = flat[0][index] if flat is not None else g[torch.unravel_index(index, g.shape)]
        parts.append(drawn.to(grads[0].device, dtype))
    return keys(torch.cat(parts), dtype).sort().values


def _scan(
    grads: Sequence[Tensor], lo: int, hi: int, dtype: torch.dtype, collect: bool
) -> tuple[int, int, int, Tensor | None]:
    """Count keys > hi, keys in [lo, hi] and those that are not finite; collect the keys in
    [lo, hi] unless they are too many."""
    above, inside, nonfinite = 0, 0, 0
    kept: list[Tensor] = []
    rows = _Rows()
    for _, pack in _packs([[g] for g in grads]):
        bits = _column(pack, 0, rows).to(dtype).view(INT[dtype])
        u = torch.bitwise_and(bits, MAGNITUDE[dtype], out=rows("keys", bits))
        # on a CPU NumPy compares and picks several times faster than torch
        v: Any = u.numpy() if u.device.type == "cpu" else u
        if v.max() >= INF[dtype]:
            nonfinite += _count(v >= INF[dtype])
        at_least, over = v >= lo, v > hi
        n_over = _count(over)
        n_inside = _count(at_least) - n_over
        above += n_over
        inside += n_inside
        if collect and n_inside and inside <= CAPACITY:
            kept.append(_pick(v, at_least ^ over))
    if not collect or inside > CAPACITY:
        return above, inside, nonfinite, None
    device = grads[0].device
    empty = torch.empty(0, dtype=INT[dtype], device=device)
    return above, inside, nonfinite, torch.cat([empty, *(x.to(device) for x in kept)])


def _count(mask: Any) -> int:
    return int(mask.count_nonzero() if isinstance(mask, Tensor) else np.count_nonzero(mask))


def _pick(values: Any, mask: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values[mask]
    return torch.from_numpy(values.take(np.flatnonzero(mask)))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of 1-d keys, 0-d int64."""
    i = values.numel() - k
    if values.device.type == "cpu":
        return torch.tensor(int(np.partition(values.numpy(), i)[i]))
    return values.kthvalue(i + 1).values.to(torch.int64)


def _guess(grads: Sequence[Tensor], k: int, n: int, dtype: torch.dtype) -> tuple[int, int]:
    """A bracket around the k-th largest key: its rank in a sample, 6 standard deviations wide."""
    size = min(max(SAMPLE_MIN, math.ceil((12 * n / CAPACITY) ** 2)), SAMPLE_MAX)
    drawn = _sample(grads, size, dtype)
    share = k / n
    rank, margin = (1 - share) * size, 6 * math.sqrt(share * (1 - share) * size) + 2
    first, last = int(rank - margin), math.ceil(rank + margin)
    return (
        int(drawn[first]) if first > 0 else 0,
        int(drawn[last]) if last < size else MAGNITUDE[dtype],
    )


def select(
    pools: Sequence[tuple[Sequence[Tensor], int]], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The key of the exact k-th largest abs(g) of every pool (method.md, step 1).

    A sample guesses a bracket that holds about 6/sqrt(sample) of the elements; one pass counts
    what lies above it and keeps what lies inside, which proves the guess or refutes it. A refuted
    or overfull bracket is narrowed by bisection over the keys: at most 63 further passes.

    Args:
        pools: gradients that are ranked together (dense real tensors, any shapes, layouts and
            floating dtypes; n elements in all) and the rank k, 1 <= k <= n.
        dtype: `working_dtype` of the tensors (or wider).

    Returns:
        The keys, at most the key of Inf plus 1, so that all NaN are tied, whatever their bits;
        and how many elements of the pool are NaN or Inf. Both int64, one for every pool, on the
        device of the first tensor.
    """
    device = pools[0][0][0].device
    found = [_exact(grads, k, dtype) for grads, k in pools]
    taus = torch.stack([key.to(device) for key, _ in found]).clamp_(max=INF[dtype] + 1)
    return taus, torch.tensor([nonfinite for _, nonfinite in found], device=device)


def _exact(grads: Sequence[Tensor], k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    grads = [g for g in grads if g.numel()]
    n = sum(g.numel() for g in grads)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n}, the number of elements, got {k}")
    if n <= CAPACITY and len(grads) > 1:
        device = grads[0].device
        grads = [torch.cat([g.reshape(-1).to(device, dtype) for g in grads])]
    # The answer lies in [low, high]; `over` keys lie above that range, `count` inside it.
    low, high, over, count = 0, MAGNITUDE[dtype], 0, n
    lo, hi = _guess(grads, k, n, dtype) if n > SAMPLE_MIN * 4 else (low, high)
    nonfinite = 0
    while low < high:
        above, inside, nonfinite, kept = _scan(grads, lo, hi, dtype, collect=lo < hi)
        if above >= k:
            low, count = hi + 1, above - over
        elif above + inside < k:
            high, over, count = lo - 1, above + inside, over + count - above - inside
        elif kept is not None:
            return _kth_largest(kept, k - above), nonfinite
        else:
            low, high, over, count = lo, hi, above, inside
        lo, hi = low, high if count <= CAPACITY else (low + high) // 2
    return torch.tensor(low, dtype=torch.int64, device=grads[0].device), nonfinite


def histogram(
    grads: Sequence[Tensor], prefix: Tensor | int, shift: int, bits: int, dtype: torch.dtype
) -> Tensor:
    """How many of the keys that begin with `prefix` have each next digit.

    One pass of a radix selection. Counts of parts add up, which is how processes find one
    threshold together (optim/_shards.py).

    Args:
        grads: dense real tensors; none at all is no error.
        prefix: what the bits above the digit have to be, key >> (shift + bits); an int or 0-d.
        shift, bits: the digit is (key >> shift) & (2**bits - 1).
        dtype: working dtype.

    Returns:
        int64 [2**bits] on the device of the first tensor (the CPU's where there is none).
    """
    grads = [g for g in grads if g.numel()]
    device = grads[0].device if grads else torch.device("cpu")
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    rows = _Rows()
    for _, pack in _packs([[g] for g in grads]):
        digits = keys(_column(pack, 0, rows), dtype) >> shift
        digits = digits[digits >> bits == _scalar(prefix, digits.device)] & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits).to(device)
    return counts


# -- combination --------------------------------------------------------------------------------


def _masks(
    g: Tensor, tau: Tensor | int, rows: _Rows, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The bits of g, and its mask as 0.0 and 1.0."""
    bits = g.view(INT[dtype])
    u = torch.bitwise_and(bits, MAGNITUDE[dtype], out=rows("keys", bits))
    return bits, torch.ge(u, tau, out=rows(name, g))


def _combine_pack(
    pack: Sequence[Sequence[Tensor]],
    has_anchor: bool,
    has_fisher: bool,
    tau_f: Tensor | int,
    tau_r: Tensor | int,
    how: Update,
    weights: Weights,
    rows: _Rows,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None, list[Tensor]]:
    """One pack of (out, theta, g_f, g_r, anchor, F, ...) pieces, as 1-d tensors: G in the dtype of
    `out`, M_f and M_r as 0.0 and 1.0, the new F, and the `STATS`.

    Masks are multiplied, not used to choose: where a gradient is not finite, neither is G.
    """
    dtype, inv_scale, online = how.dtype, how.inv_scale, how.online
    g_f, g_r = _column(pack, 2, rows).to(dtype), _column(pack, 3, rows).to(dtype)
    bits_f, m_f = _masks(g_f, tau_f, rows, "m_f", dtype)
    bits_r, m_r = _masks(g_r, tau_r, rows, "m_r", dtype)
    if inv_scale is not None:
        g_f = torch.mul(g_f, inv_scale, out=rows("g_f", g_f))
        g_r = torch.mul(g_r, inv_scale, out=rows("g_r", g_r))
    both = torch.mul(m_f, m_r, out=rows("both", g_f))
    only_r = torch.sub(m_r, both, out=rows("only_r", g_f))
    out, spare = rows("out", g_f), rows("spare", g_f)

    if weights.only_r:
        torch.mul(m_f, g_f, out=out)
        out.addcmul_(only_r, g_r)
    else:
        if weights.on_f:
            torch.add(g_f, g_r, alpha=weights.on_r, out=out)
        else:
            torch.mul(g_r, weights.on_r, out=out)
        out.addcmul_(m_f, g_f, value=weights.on_m)
    # in this order alpha = 0 leaves exactly g_r of a blend
    out.addcmul_(both, g_f, value=-weights.blend)
    out.addcmul_(both, g_r, value=weights.blend)

    moved_sq = None
    if has_anchor:
        moved = spare
        for (_, theta, _, _, anchor, *_), part in _parts(pack, moved):
            torch.sub(theta.reshape(-1).to(dtype), _flat_on(anchor, theta, dtype), out=part)
        moved_sq = torch.mul(moved, moved, out=rows("moved_sq", g_f))
        if has_fisher and weights.penalty != "none":
            for piece, part in _parts(pack, moved):
                part.mul_(_flat_on(piece[5], part, dtype))
            # p of eqs. 8 and 9 is `strength` times what is in `moved` now
            strength = 1.0 if isinstance(how.gamma, Tensor) else how.gamma
            if isinstance(how.gamma, Tensor):
                moved.mul_(how.gamma)
            if weights.penalty == "partial":
                out.addcmul_(only_r, moved, value=strength)
            else:
                out.add_(moved, alpha=strength)

    opposed = torch.bitwise_xor(bits_f, bits_r, out=rows("keys", bits_f))  # the sign bits differ
    sums = [
        m_f.sum(),
        m_r.sum(),
        both.sum(),
        torch.dot(both, torch.lt(opposed, 0, out=spare)),
        _dot(g_f, g_r),
        _dot(g_f, g_f),
        _dot(g_r, g_r),
        _dot(out, out),
    ]
    if moved_sq is None:
        sums += [out.new_zeros(())] * 4
    else:
        on_f, on_r, on_both = (_dot(moved_sq, m) for m in (m_f, m_r, both))
        rest = moved_sq.sum() - on_f - on_r + on_both
        sums += [on_f - on_both, on_r - on_both, on_both, rest.clamp_(min=0)]
    new_fisher = None
    if online is not None and has_fisher:
        fisher = _column(pack, 5, rows)
        wide = fisher.to(out.device, torch.float64 if fisher.dtype == torch.float64 else dtype)
        new_fisher = torch.lerp(wide, torch.mul(g_r, g_r, out=spare).to(wide.dtype), online)
        new_fisher = new_fisher.to(fisher.dtype)
        sums.append(new_fisher.sum(dtype=wide.dtype).to(dtype))
    else:
        sums.append(out.new_zeros(()))
    result = out.to(pack[0][0].dtype)
    # where the sum of the squares is finite, so is each of them
    finite = result is out and out.device.type == "cpu" and bool(sums[7].isfinite())
    count = out.new_zeros(()) if finite else (keys(result, dtype) >= INF[dtype]).sum()
    return result, (m_f, m_r), new_fisher, [*sums, count]


def _flat_on(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """1-d, of `dtype` and where `like` is: theta0 and F may lie on the CPU."""
    return t.to(like.device, dtype, non_blocking=True).reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product, in float64 where float32 does not hold it."""
    product = torch.dot(a, b)
    if a.device.type == "cpu" and not product.isfinite():
        product = torch.dot(a.double(), b.double())
    return product


def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """Steps 2 to 5 of method.md: regions, penalty, modulation and combination.

    Args:
        columns: what is read, and written in place.
        taus: the keys that `select` returned; a key of 0 selects every non-zero scalar.
        how: the options.
        stats: float64 vector of len(STATS), added to.
    """
    taus = taus.clamp(min=1)  # zeros are never selected
    numbers = taus.tolist() if taus.device.type == "cpu" else None
    buffers, weights = _Rows(), how.weights()
    rows = []
    for theta, g_f, g_r, anchor, fisher, out, held in zip(*columns.tensors, strict=True):
        rest = [t for t in (anchor, fisher, held) if t is not None]
        rows.append([out, theta, g_f, g_r, *rest])
    has_anchor, has_fisher, has_held = (
        bool(rows) and column[0] is not None
        for column in (columns.anchors, columns.fishers, columns.held)
    )
    for (pool, other), pack in _packs(rows, list(zip(columns.pool_f, columns.pool_r, strict=True))):
        device = pack[0][0].device
        result, (m_f, m_r), new_fisher, sums = _combine_pack(
            pack,
            has_anchor,
            has_fisher,
            numbers[pool] if numbers else taus[pool].to(device),
            numbers[other] if numbers else taus[other].to(device),
            how._replace(
                gamma=_scalar(how.gamma, device), inv_scale=_scalar(how.inv_scale, device)
            ),
            weights,
            buffers,
        )
        stats += torch.stack(sums).to(stats)
        targets = [(0, result)]
        if new_fisher is not None:
            targets.append((5, new_fisher))
        if has_held:
            kept = _column(pack, 1, buffers).masked_fill(m_f + m_r > 0, math.nan)
            targets.append((-1, kept))
        for j, values in targets:
            for piece, part in _parts(pack, values):
                piece[j].copy_(part.view(piece[j].shape))


def _scalar(value: Any, device: torch.device) -> Any:
    """On the CPU a number (reading it waits for nothing), elsewhere a 0-d tensor there."""
    if not isinstance(value, Tensor):
        return value
    return value.item() if device.type == value.device.type == "cpu" else value.to(device)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a 0-d tensor."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        by_device.setdefault(t.device, []).append(t)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))


def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """Put back the scalars that `combine` kept in `held` (those that are not NaN)."""
    for theta, kept in zip(params, held, strict=True):
        if kept is None:
            continue
        for p, h in pieces([theta, kept]):
            p.copy_(torch.where(h.isnan(), p, h))
