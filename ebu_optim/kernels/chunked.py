"""The plain-torch kernels in chunks of fixed size, used by `fused=False` and as every fallback.

They run on any device and any floating dtype. Temporaries are bounded by a constant, whatever the
number of parameters. On an accelerator they wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from . import _pieces
from ._chunked_selection import histogram, select
from ._pieces import Rows, column, on_device, packs, parts, pieces
from .contract import INF, INT, MAGNITUDE, Columns, Update, Weights, key_of_nothing, keys

__all__ = ["combine", "finite_probe", "histogram", "restore", "scale", "select"]

#: Pieces of some parameters, by the names of `Columns`; columns that are None are left out.
Pack = Mapping[str, Sequence[Tensor]]


class _Regions(NamedTuple):
    """M_f, M_r, their overlap, and the scalars selected only by M_r, as 0.0 and 1.0."""

    f: Tensor
    r: Tensor
    both: Tensor
    only_r: Tensor


def _mask(g: Tensor, tau: Tensor | int, rows: Rows, name: str) -> tuple[Tensor, Tensor]:
    """Return the bits of g, and its mask as 0.0 and 1.0."""
    bits = g.view(INT[g.dtype])
    u = torch.bitwise_and(bits, MAGNITUDE[g.dtype], out=rows("keys", bits))
    return bits, torch.ge(u, tau, out=rows(name, g))


def _regions(
    g_f: Tensor, g_r: Tensor, taus: Sequence[Tensor | int], rows: Rows
) -> tuple[_Regions | None, list[Tensor]]:
    """Return the regions and their sizes, which are the first four of the `STATS`.

    The regions are None if nothing is selected.
    """
    if not taus:
        return None, [g_f.new_zeros(())] * 4
    (bits_f, m_f), (bits_r, m_r) = (
        _mask(g, tau, rows, name) for g, tau, name in zip((g_f, g_r), taus, ("m_f", "m_r"))
    )
    both = torch.mul(m_f, m_r, out=rows("both", g_f))
    only_r = torch.sub(m_r, both, out=rows("only_r", g_f))
    signs = torch.bitwise_xor(bits_f, bits_r, out=rows("keys", bits_f))  # negative if they differ
    opposed = torch.lt(signs, 0, out=rows("spare", g_f))
    counts = [m_f.sum(), m_r.sum(), both.sum(), torch.dot(both, opposed)]
    return _Regions(m_f, m_r, both, only_r), counts


def _mixed(g_f: Tensor, g_r: Tensor, at: _Regions | None, weights: Weights, rows: Rows) -> Tensor:
    """Return G without the penalty.

    Masks are multiplied and not used to choose, so G is not finite where a gradient is not finite.
    """
    out = rows("out", g_f)
    if weights.on_f == 1:
        torch.add(g_f, g_r, alpha=weights.on_r, out=out)
    else:
        torch.mul(g_f, weights.on_f, out=out).add_(g_r, alpha=weights.on_r)
    if at is None:
        return out
    if weights.on_m:
        out.addcmul_(at.f, g_f, value=weights.on_m)
    if weights.only_r:
        out.addcmul_(at.only_r, g_r, value=weights.only_r)
    if weights.blend:  # in this order, alpha = 0 gives exactly g_r
        out.addcmul_(at.both, g_f, value=-weights.blend)
        out.addcmul_(at.both, g_r, value=weights.blend)
    return out


def _add_penalty(
    out: Tensor, pack: Pack, at: _Regions | None, how: Update, rows: Rows
) -> list[Tensor]:
    """Add p (eqs. 8, 9) to `out`; return the sums of (theta - theta0)^2 over each region."""
    if "anchors" not in pack:
        return [out.new_zeros(())] * 4
    moved = rows("spare", out)
    for theta, anchor, part in zip(
        pack["params"], pack["anchors"], moved.split([t.numel() for t in pack["params"]])
    ):
        torch.sub(theta.reshape(-1).to(how.dtype), _flat_on(anchor, theta, how.dtype), out=part)
    square = torch.mul(moved, moved, out=rows("moved_sq", out))
    if "fishers" in pack and how.weights.penalty != "none":
        for fisher, part in parts(pack["fishers"], moved):
            part.mul_(fisher.to(part.device, how.dtype, non_blocking=True))
        # p is `strength` times the present value of `moved`
        strength = 1.0 if isinstance(how.gamma, Tensor) else how.gamma
        if isinstance(how.gamma, Tensor):
            moved.mul_(how.gamma)
        if how.weights.penalty == "full":
            out.add_(moved, alpha=strength)
        elif at is not None:
            out.addcmul_(at.only_r, moved, value=strength)
    if at is None:
        return [*[out.new_zeros(())] * 3, square.sum()]
    on_f, on_r, on_both = (_dot(square, m) for m in (at.f, at.r, at.both))
    rest = square.sum() - on_f - on_r + on_both
    return [on_f - on_both, on_r - on_both, on_both, rest.clamp_(min=0)]


def _online(pack: Pack, g_r: Tensor, how: Update, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the new F and its sum."""
    fisher = column(pack["fishers"], "fishers", rows)
    dtype = torch.float64 if fisher.dtype == torch.float64 else how.dtype
    square = torch.mul(g_r, g_r, out=rows("spare", g_r)).to(dtype)
    new = torch.lerp(fisher.to(g_r.device, dtype), square, how.online).to(fisher.dtype)
    return new, new.sum(dtype=dtype).to(how.dtype)


def _combine_pack(
    pack: Pack, taus: Sequence[Tensor | int], how: Update, rows: Rows
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the new values of the columns out, fishers and held, 1-d; and the `STATS`."""
    g_f, g_r = (column(pack[name], name, rows).to(how.dtype) for name in ("g_f", "g_r"))
    at, counts = _regions(g_f, g_r, taus, rows)
    if how.inv_scale is not None:
        g_f = torch.mul(g_f, how.inv_scale, out=rows("scaled g_f", g_f))
        g_r = torch.mul(g_r, how.inv_scale, out=rows("scaled g_r", g_r))
    out = _mixed(g_f, g_r, at, how.weights, rows)
    moved = _add_penalty(out, pack, at, how, rows)
    products = [_dot(a, b) for a, b in ((g_f, g_r), (g_f, g_f), (g_r, g_r), (out, out))]

    result = out.to(pack["out"][0].dtype)
    new, fisher_sum = {"out": result}, out.new_zeros(())
    if how.online is not None and "fishers" in pack:
        new["fishers"], fisher_sum = _online(pack, g_r, how, rows)
    if "held" in pack:
        theta = column(pack["params"], "params", rows)
        new["held"] = theta if at is None else theta.masked_fill(at.f + at.r > 0, math.nan)
    # if the sum of the squares is finite, every element is
    finite = result is out and out.device.type == "cpu" and bool(products[3].isfinite())
    wrong = out.new_zeros(()) if finite else (keys(result, how.dtype) >= INF[how.dtype]).sum()
    return new, [*counts, *products, *moved, fisher_sum, wrong]


def _flat_on(t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return t as 1-d, in `dtype` on the device of `like`: theta0 and F may be on the CPU."""
    return t.to(like.device, dtype, non_blocking=True).reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product, in float64 if float32 overflows."""
    product = torch.dot(a, b)
    if a.device.type == "cpu" and not product.isfinite():
        product = torch.dot(a.double(), b.double())
    return product


def combine(columns: Columns, taus: Tensor, how: Update, stats: Tensor) -> None:
    """As `reference.combine`."""
    taus = taus.clamp(min=1)  # zeros are never selected
    numbers = taus.tolist() if taus.device.type == "cpu" else None
    selects = numbers is None or min(numbers) < key_of_nothing(how.dtype)
    there = {
        name: found
        for name, found in zip(Columns._fields, columns.tensors)
        if found and found[0] is not None
    }
    buffers = Rows()
    pools = list(zip(columns.pool_f, columns.pool_r, strict=True))
    for pair, rows in packs(list(zip(*there.values(), strict=True)), pools):
        pack = dict(zip(there, zip(*rows)))
        device = pack["params"][0].device
        here = [numbers[i] if numbers else taus[i].to(device) for i in pair] if selects else []
        gamma, inv_scale = (on_device(x, device) for x in (how.gamma, how.inv_scale))
        own = how._replace(gamma=gamma, inv_scale=inv_scale)
        new, sums = _combine_pack(pack, here, own, buffers)
        stats += torch.stack(sums).to(stats)
        for name, values in new.items():
            for piece, part in parts(pack[name], values):
                piece.copy_(part)


def finite_probe(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return 0 if every element of every tensor is finite, else NaN, without waiting for a device.

    The result is 0-d float32 on the device of the first tensor; None if there are no elements. It
    is sum(0 * x), because 0 * sum(x) would overflow in float16.
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
            zeros[t.dtype] = t.new_zeros(_pieces.CHUNK_CPU)
        for (x,) in pieces([t]):
            found.append(torch.dot(x.reshape(-1), zeros[t.dtype][: x.numel()]).float())
    return torch.stack(found).sum()


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply in place by a 0-d tensor."""
    devices = set(map(attrgetter("device"), tensors))
    for device in devices:
        group = [t for t in tensors if t.device == device] if len(devices) > 1 else list(tensors)
        torch._foreach_mul_(group, factor.to(device))


def restore(params: Sequence[Tensor], held: Sequence[Tensor | None]) -> None:
    """As `reference.restore`."""
    for theta, kept in zip(params, held, strict=True):
        if kept is None:
            continue
        for p, h in pieces([theta, kept]):
            p.copy_(torch.where(h.isnan(), p, h))
