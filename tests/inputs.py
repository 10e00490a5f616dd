"""Hard inputs for the kernels, and calls of them that show what an implementation leaves out."""

from __future__ import annotations

import itertools
import math
import os
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from ebu_optim.kernels import _chunked_selection, _pieces, chunked, cpu, reference, triton
from ebu_optim.kernels.contract import Columns, Update, Weights

from . import devices, oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 2, 4), (1, 6, 1), (40,))
LAYOUTS = ("contiguous", "transposed", "strided", "channels_last", "expanded", "offset")
FINITE = ("normal", "ties", "equal", "zero", "denormal", "signed zero", "wide")
KINDS = (*FINITE, "inf", "nan", "all nan")
REAL = {}
ADDED = Weights.reading(alpha=0.6, penalty="partial", update="added", terms=(True,) * 3)
TINY = {"CHUNK_CPU": 8, "CAPACITY": 6, "SAMPLE_MIN": 4, "SAMPLE_MAX": 16}


class Native:
    """The C extension with the loops of one instruction set."""

    def __init__(self, lanes):
        self.lanes = lanes

    def __getattr__(self, name):
        cpu._cpu.lanes(self.lanes)
        return getattr(cpu, name)


def _native(lanes):
    reason = cpu.available()
    if devices.chosen.type != "cpu":
        reason = "for tensors on the CPU"
    if reason is None:
        try:
            cpu._cpu.lanes(lanes)
        except ValueError as error:
            reason = str(error)
        finally:
            cpu._cpu.lanes()
    marks = pytest.mark.skip(reason=reason) if reason else ()
    return pytest.param(Native(lanes), id=f"cpu-{lanes}", marks=marks)


NATIVE = [_native(lanes) for lanes in ("base", "avx2", "avx512")]
#: For parametrize: every backend of the device, as `kernels`.
PLAIN = [
    pytest.param(module, id=module.__name__.rpartition(".")[2]) for module in (reference, chunked)
]
BACKENDS = [*PLAIN, *NATIVE]
if devices.chosen.type == "cuda":
    BACKENDS.append(pytest.param(triton, id="triton"))
if os.environ.get("TRITON_INTERPRET") == "1":  # a process of `test_triton.py`
    BACKENDS = [pytest.param(triton, id="triton")]
every_backend = pytest.mark.parametrize("kernels", BACKENDS)
every_native = pytest.mark.parametrize("kernels", NATIVE)


def fill(kind, shape, dtype, rng):
    x = rng.standard_normal(shape)
    n = rng.integers(-2, 3, shape).astype(float)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = {
        "ties": n,
        "equal": np.where(n > 0, 1.5, -1.5),
        "zero": 0 * x,
        "denormal": n * tiny,
        "signed zero": np.where(n > 1, x, np.copysign(0.0, x)),
        "wide": x * 10.0 ** rng.integers(-4, 4, shape),
        "inf": np.where(n > 0, np.copysign(np.inf, x), x),
        "nan": np.where(n > 1, np.nan, np.where(n > 0, np.inf, x)),
        "all nan": np.full(shape, np.nan),
    }.get(kind, x)
    return torch.tensor(x, dtype=dtype)


def lay_out(t, layout):
    if layout == "transposed" and t.dim() > 1:
        return t.mT.contiguous().mT
    if layout == "strided" and t.dim():
        return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)[..., :-1:2].copy_(t)
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and t.numel():
        return t.reshape(-1)[0].expand(t.shape)
    if layout == "offset":
        return t.new_zeros(t.numel() + 3)[3:].view(t.shape).copy_(t)
    return t


@st.composite
def gradients(draw, kinds=KINDS):
    """A function kind -> list of tensors with the same shapes and dtypes at every call."""
    if draw(st.booleans()):
        shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    else:
        shapes = [(1,)] * draw(st.integers(1, 30)) + [()]
    dtypes = draw(st.one_of(st.sampled_from(DTYPES).map(lambda d: [d]), st.just(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3)

    def make(kind=None):
        kind = kind or draw(st.sampled_from(kinds))
        return [
            lay_out(fill(kind, s, d, rng), o)
            for s, d, o in zip(shapes, itertools.cycle(dtypes), itertools.cycle(draw(layouts)))
        ]

    return make


def numpy(tensors):
    return [t.detach().double().clone().cpu().numpy() for t in tensors]


@contextmanager
def constants(values):
    """Yield the calls of `_chunked_selection._scan` as (lo, hi, above, inside, collected)."""
    scans, scan = [], _chunked_selection._scan

    def recorded(grads, lo, hi, dtype, collect):
        above, inside, nonfinite, kept = scan(grads, lo, hi, dtype, collect)
        scans.append((lo, hi, above, inside, kept is not None))
        return above, inside, nonfinite, kept

    walk = {name: value for name, value in values.items() if name == "CHUNK_CPU"}
    rest = {name: value for name, value in values.items() if name not in walk}
    with (
        mock.patch.multiple(_pieces, **walk or {"CHUNK_CPU": _pieces.CHUNK_CPU}),
        mock.patch.multiple(_chunked_selection, **rest, _scan=recorded),
    ):
        yield scans


sizes = st.one_of(
    st.just(REAL),
    st.just(TINY),
    st.fixed_dictionaries({k: st.sampled_from((1, 2, 5, 30)) for k in TINY}),
)


def rank(n, delta):
    return max(1, math.floor(delta * n + 0.5))


def total(tensors):
    return sum(t.numel() for t in tensors)


def threshold(grads, k, dtype, kernels=reference):
    """The key of one pool, 0-d."""
    taus, nonfinite = kernels.select([(grads, k)], dtype)
    assert taus.shape == nonfinite.shape == (1,)
    assert taus.dtype == nonfinite.dtype == torch.int64
    assert int(nonfinite) == sum(int((~g.isfinite()).sum()) for g in grads)
    return taus[0]


def combine(
    theta,
    g_f,
    g_r,
    anchor=None,
    fisher=None,
    *,
    delta=(0.5, 0.5),
    out=None,
    held=None,
    gamma=1.0,
    online=None,
    inv_scale=None,
    kernels=reference,
    weights=None,
    **options,
):
    """Outputs start as NaN and what is held as 777, so that an unwritten one fails.

    With a `delta` of None nothing is selected.
    """
    dtype = reference.working_dtype([*g_f, *g_r])
    n, none = total(theta), [None] * len(theta)
    if delta is None:
        taus = torch.tensor([reference.key_of_nothing(dtype)] * 2)
    else:
        pools = [(g, rank(n, d)) for g, d in zip((g_f, g_r), delta)]
        taus, _ = kernels.select(pools, dtype)
    first, second = ([which] * len(theta) for which in (0, 1))
    out = [torch.full_like(t, math.nan) for t in theta] if out is None else out
    held = [torch.full_like(t, 777.0) for t in theta] if held is None else held
    stats = torch.zeros(len(reference.STATS), dtype=torch.float64)
    options = {"alpha": 0.6, "penalty": "partial", "update": "added"} | options
    terms = options.pop("terms", oracle.TERMS)
    columns = Columns(theta, g_f, g_r, anchor or none, fisher or none, out, held, first, second)
    if weights is None:
        weights = Weights.reading(terms=tuple(t in terms for t in oracle.TERMS), **options)
    kernels.combine(columns, taus, Update(weights, gamma, online, inv_scale, dtype), stats)
    return out, held, dict(zip(reference.STATS, stats.tolist(), strict=True))


def assert_masks(held, theta, masks):
    for h, t, m in zip(held, theta, masks, strict=True):
        expected = torch.where(torch.tensor(m), math.nan, t)
        torch.testing.assert_close(h, expected.to(h.dtype), rtol=0, atol=0, equal_nan=True)
