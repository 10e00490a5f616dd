"""`_triton_parts`: what is loaded and stored, by kind, and sums by thread."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ebu_optim.kernels import reference
from ebu_optim.kernels._tables import KINDS
from ebu_optim.kernels._triton_parts import (
    by_thread,
    load_float,
    magnitude,
    round_to,
    store,
    stored_value,
)

from .shared import TAKEN, combine, same

TILE = tl.constexpr(64)
every_dtype = pytest.mark.parametrize("dtype", TAKEN)


def values(dtype):
    """TILE values, the hard ones among them."""
    hard = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 6e-8, 1e-40, 3.4e38, 1.00390625]
    normal = torch.randn(int(TILE) - len(hard), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(hard), normal]).to(dtype)


@triton.jit
def copy_kernel(addresses, n, KIND: tl.constexpr, IS_FULL: tl.constexpr):
    offs = tl.arange(0, TILE)
    x = load_float(tl.load(addresses), offs, offs < n, KIND, IS_FULL)
    store(tl.load(addresses + 1), offs, offs < n, round_to(x, KIND), KIND, IS_FULL)


@every_dtype
@pytest.mark.parametrize(("full", "n"), [(True, 64), (False, 64), (False, 5)])
def test_what_is_loaded_is_stored_and_what_is_masked_is_left(dtype, full, n):
    x, to = values(dtype), torch.full((int(TILE),), 7.0, dtype=dtype)
    addresses = torch.tensor([x.data_ptr(), to.data_ptr()])
    copy_kernel[(1,)](addresses, n, KIND=KINDS[dtype], IS_FULL=full)
    same(to, torch.cat([x[:n], torch.full_like(x[n:], 7.0)]))


@every_dtype
@pytest.mark.parametrize("at", [0, 1])
def test_promise_of_16_bytes_that_is_not_kept_is_seen_in_debug_mode(dtype, at):
    x, to = values(dtype).repeat(2), torch.zeros(2 * int(TILE), dtype=dtype)
    addresses = torch.tensor([x.data_ptr(), to.data_ptr()])
    addresses[at] += dtype.itemsize
    with pytest.raises(Exception, match="promises 16-byte boundaries"):
        copy_kernel[(1,)](addresses, int(TILE), KIND=KINDS[dtype], IS_FULL=True)
    copy_kernel[(1,)](addresses, int(TILE), KIND=KINDS[dtype], IS_FULL=False)


@triton.jit
def rounded_kernel(x, to, keys, KIND: tl.constexpr):
    offs = tl.arange(0, TILE)
    value = tl.load(x + offs)
    tl.store(to + offs, stored_value(round_to(value, KIND), KIND))
    tl.store(keys + offs, magnitude(value))


@every_dtype
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_numbers_are_rounded_as_torch_rounds_them_and_their_keys_are_the_references(dtype):
    x = values(torch.float32)
    to, keys = torch.empty_like(x), torch.empty(len(x), dtype=torch.int32)
    rounded_kernel[(1,)](x, to, keys, KIND=KINDS[dtype])
    same(to, x.to(dtype).float())
    assert keys.equal(reference.keys(x, torch.float32))


@triton.jit
def sums_kernel(x, to, LANE: tl.constexpr):
    sums = by_thread(tl.load(x + tl.arange(0, TILE)), LANE)
    tl.store(to + tl.arange(0, TILE // LANE), sums)


@pytest.mark.parametrize("lane", [1, 4, 8])
def test_sums_by_thread_are_those_of_neighbours(lane):
    x = torch.arange(int(TILE), dtype=torch.int32) ** 2
    to = torch.empty(len(x) // lane, dtype=torch.int32)
    sums_kernel[(1,)](x, to, LANE=lane)
    assert to.tolist() == x.view(-1, lane).sum(1).tolist()


def test_bfloat16_is_rounded_as_torch_rounds_it():
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, 1000).astype(np.int32)
    edge = np.array(
        [0x7F7FFFFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x8000, 0x8001, 0x7FFFFFFF, -1]
    )
    x = torch.from_numpy(np.concatenate([bits, edge.astype(np.int32)])).view(torch.float32)
    zeros, theta = torch.zeros(len(x)), torch.zeros(len(x), dtype=torch.bfloat16)
    out = [torch.full_like(theta, 7)]
    combine([theta], [zeros], [x.clone()], out=out, terms=("remember",), penalty="none")
    same(out[0], x.to(torch.bfloat16))
