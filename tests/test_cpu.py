"""What only the C extension has: paths, threads, instruction sets, 16-bit conversion, alignment."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebu_optim import kernels
from ebu_optim.kernels import chunked, cpu, reference

from .inputs import DTYPES, KINDS, NATIVE, combine, every_native, fill, rank
from .poison import poison  # noqa: F401

built = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def a_team_at_any_size(monkeypatch):
    monkeypatch.setattr(cpu, "_TEAM", 1)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def bits(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


# -- selection ----------------------------------------------------------------------------------

shapes = st.lists(st.sampled_from((1, 7, 100, 2048, 8192, 9001)), min_size=1, max_size=4)


@every_native
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    sizes=shapes,
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    dtypes=st.lists(st.sampled_from(DTYPES[:3]), min_size=1, max_size=2),
)
def test_keys_are_the_references_bit_for_bit(kernels, data, sizes, kind, seed, dtypes):
    rng = np.random.default_rng(seed)
    grads = [fill(kind, (s,), dtypes[i % len(dtypes)], rng) for i, s in enumerate(sizes)]
    grads.append(torch.zeros(1).to(dtypes[0]).expand(data.draw(st.sampled_from((1, 5, 9000)))))
    n = sum(g.numel() for g in grads)
    pools = [(grads, data.draw(st.integers(1, n), "k")), (grads[:1], 1), (grads, n), (grads, 1)]
    for got, want in zip(
        kernels.select(pools, torch.float32), reference.select(pools, torch.float32)
    ):
        same(got, want)


def drawn(n, attempt):
    where = torch.zeros(n, dtype=torch.int64)
    return where[: cpu._cpu.positions(n, attempt, where.data_ptr())]


@built
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("fooled", "path"), [((), "bracket"), ((1,), "second bracket"), ((1, 2), "radix")]
)
@pytest.mark.parametrize("shift", [-10, 10])
def test_a_bracket_that_the_sample_got_wrong_is_refuted_and_the_result_exact(
    threads, fooled, path, shift
):
    n = 50_000
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 20
    for attempt in fooled:
        x[drawn(n, attempt)] += shift
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for grads in ([x], [x[:100], x[100:40_000], x[40_000:]]):
            key, bad, paths = cpu._select([(grads, n // 2)], torch.float32)
            assert paths == [path]
            assert int(bad) == 0
            want = x.abs().kthvalue(n - n // 2 + 1).values
            same(reference.key_to_value(key[0], torch.float32), want)
    finally:
        torch.set_num_threads(previous)


@built
@pytest.mark.parametrize("value", [0.0, 1.5, 1e-45, math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_ties_are_counted_not_kept(value, dtype):
    """However many: the bracket holds what lies between its ends."""
    x = torch.full((100_000,), value).to(dtype)
    x[::3] = 2.0
    for k in (1, 30_000, 33_334, 33_335, 60_000, 100_000):
        got = cpu._select([([x], k)], torch.float32)
        assert got[2] == ["bracket"]
        for a, b in zip(got[:2], reference.select([([x], k)], torch.float32)):
            same(a, b)


@built
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_one_value_expanded_as_a_missing_gradient_is_keeps_the_extension(dtype):
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(3000, generator=g).to(dtype), torch.zeros((), dtype=dtype).expand(40, 50)]
    for k in (1, 2999, 3001, 5000):
        found = cpu._select([(grads, k)], torch.float32)
        assert found[2] != ["reference"]
        for got, want in zip(found[:2], reference.select([(grads, k)], torch.float32)):
            same(got, want)


@built
def test_many_pools_and_many_tensors():
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(i % 7, 3, generator=g) for i in range(10_000)]
    tensors[77] = torch.randn(70_001, generator=g)
    one = [(tensors, 12_345)]
    each = [([t], rank(t.numel(), 0.4)) for t in tensors if t.numel()]
    for pools in (one, each):
        for got, want in zip(
            cpu.select(pools, torch.float32), reference.select(pools, torch.float32)
        ):
            same(got, want)


# -- combination --------------------------------------------------------------------------------


def problem(sizes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    columns = [[torch.randn(s, generator=g).to(dtype) for s in sizes] for _ in range(5)]
    columns[4] = [f.abs().float() for f in columns[4]]
    return columns


def test_small_work_waits_for_no_other_thread(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert cpu._threads(1) == cpu._threads((1 << 24) - 1) == 1
    assert cpu._threads(1 << 24) == 8


SIZES = (1, 15, 16, 17, 1023, 1024, 1025, 3 * 65536 + 5, 40_000)


@built
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_the_result_does_not_depend_on_the_number_of_threads(dtype):
    results = []
    previous = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            columns = problem(SIZES, dtype)
            results.append((*combine(*columns, online=0.25, kernels=cpu), columns[4]))
    finally:
        torch.set_num_threads(previous)
    for other in results[1:]:
        same(other, results[0])


@built
def test_flush_to_zero_of_the_caller_holds_in_every_thread():
    """It is a mode of one thread: the others would keep the denormals."""
    n = 40 * 65536
    g = torch.full((n,), 1e-39)
    results = []
    previous = torch.get_num_threads()
    torch.set_num_threads(3)
    combine([torch.ones(n)], [g], [g], kernels=cpu)  # threads that start later inherit the mode
    if not torch.set_flush_denormal(True):
        torch.set_num_threads(previous)
        pytest.skip("this processor does not flush")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(combine([torch.ones(n)], [g], [g], kernels=cpu))
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(previous)
    same(results[1], results[0])
    assert results[0][2]["overlap"] == n
    assert not results[0][0][0].any()


@built
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("update", ["added", "replaced", "routed"])
def test_every_instruction_set_has_the_same_elements(dtype, update):
    results = []
    for backend in [reference, *(p.values[0] for p in NATIVE if not p.marks)]:
        columns = problem(SIZES, dtype)
        inv_scale = torch.tensor(1 / 3)
        options = {"online": 0.75, "inv_scale": inv_scale, "update": update, "kernels": backend}
        results.append((*combine(*columns, **options), columns[4]))
    (_, held, plain, _), first = results[0], results[1]
    for out, kept, stats, fisher in results[1:]:
        same([out, kept, fisher], [first[0], held, first[3]])
        assert stats == pytest.approx(first[2], rel=1e-6)
        assert stats == pytest.approx(plain, rel=1e-4)  # whose sums are in float32


@every_native
@pytest.mark.parametrize("n", [*range(1, 34), 1030])
def test_nothing_is_written_beside_the_outputs(kernels, n):
    theta, g_f, g_r, anchor, fisher = problem([n])
    wide = [torch.full((n + 40,), 55.0) for _ in range(3)]
    out, held, F = ([w[20 : 20 + n]] for w in wide)
    F[0].copy_(fisher[0])
    combine(theta, g_f, g_r, anchor, F, out=out, held=held, online=0.5, kernels=kernels)
    for w in wide:
        assert (w[:20] == 55).all()
        assert (w[20 + n :] == 55).all()
        assert (w[20 : 20 + n] != 55).all()


def unaligned(t):
    """A copy at an odd address."""
    room = bytearray(t.numel() * t.element_size() + 1)
    at = torch.frombuffer(room, dtype=t.dtype, offset=1, count=t.numel()) if t.numel() else t
    return at.copy_(t)


@every_native
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_addresses_of_any_alignment(kernels, dtype):
    columns = problem([33, 20_003], dtype)
    odd = [[unaligned(t) for t in column] for column in columns]
    assert all(t.data_ptr() % 2 for column in odd for t in column)
    out, held = ([unaligned(t * math.nan) for t in columns[0]] for _ in range(2))
    got = combine(*odd, out=out, held=held, online=0.5, kernels=kernels)
    want = combine(*columns, online=0.5, kernels=kernels)
    same([*got, odd[4]], [*want, columns[4]])
    moved = [t + 1 for t in odd[0]]
    kernels.restore(odd[0], held)
    reference.restore(moved, held)
    assert kernels.finite_probe(odd[1]) == 0


# -- 16 bits ------------------------------------------------------------------------------------


@every_native
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("flush", [False, True])
def test_every_16_bit_pattern_survives(kernels, dtype, flush):
    theta = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros, held = torch.zeros_like(theta), torch.zeros_like(theta)
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor does not flush")
    try:
        combine([theta], [zeros], [zeros], held=[held], kernels=kernels)
        old = torch.zeros_like(theta)
        kernels.restore([old], [held])
        keys = kernels.select(
            [([theta[i : i + 1]], 1) for i in range(0, 1 << 16, 97)], torch.float32
        )
    finally:
        torch.set_flush_denormal(False)
    number = ~theta.isnan()
    same(bits(held)[number], bits(theta)[number])
    assert held[~number].isnan().all()
    same(bits(old)[number], bits(theta)[number])
    want = bits(theta.float()[::97]) & 0x7FFFFFFF
    same(keys[0], want.long().clamp(max=0x7F800001))


@every_native
@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits_is_torchs(kernels, dtype):
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.integers(-(2**31), 2**31, 200_000), dtype=torch.int32).view(torch.float32)
    near = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    steps = torch.tensor([0, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32)
    x = torch.cat([x, (bits(near)[:, None] + steps).view(-1).view(torch.float32), -near])
    x = x[x.isfinite() & ((x.abs() >= torch.finfo(torch.float32).tiny) | (x == 0))]
    out = torch.full(x.shape, math.nan, dtype=dtype)
    _, _, stats = combine(
        [torch.zeros_like(out)],
        [torch.zeros_like(x)],
        [x],
        out=[out],
        terms=("remember",),
        kernels=kernels,
    )
    want = x.to(dtype)
    assert torch.equal(out, want)
    assert stats["update_nonfinite"] == int((~want.isfinite()).sum()) > 0


# -- the rest -----------------------------------------------------------------------------------


@every_native
def test_probe_finds_one_bad_element_anywhere(kernels):
    for dtype in DTYPES:
        x = torch.ones(70_000, dtype=dtype)
        tensors = [torch.empty(0, dtype=dtype), x[:40_000:2], x[1:].view(-1, 3).t()]
        probe = kernels.finite_probe(tensors)
        assert (probe.dtype, probe.shape, float(probe)) == (torch.float32, (), 0.0)
        for i in (0, 39_998, 69_999):
            for value in (math.nan, -math.inf):
                x[i] = value
                assert kernels.finite_probe(tensors).isnan()
            x[i] = 1
    assert kernels.finite_probe([torch.empty(0)]) is None


@built
def test_calls_from_several_threads_do_not_meet():
    x = [torch.randn(300_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    want = [cpu.select([([t], 1000)], torch.float32) for t in x]
    got = [[] for _ in x]

    def work(i):
        for _ in range(5):
            got[i].append(cpu.select([([x[i]], 1000)], torch.float32))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [len(g) for g in got] == [5] * len(x)
    same(got, [[w] * 5 for w in want])


@pytest.mark.skipif("EBU_OPTIM_TESTED" not in os.environ, reason="no build was asked for")
def test_the_extension_is_the_one_that_was_asked_for():
    """So that a build that failed, or another one, cannot pass for it."""
    assert cpu.available() is None
    assert Path(os.environ["EBU_OPTIM_TESTED"]).resolve() in Path(cpu._cpu.__file__).parents


@built
def test_an_instruction_set_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no avx9000"):
        cpu._cpu.lanes("avx9000")


def test_without_the_extension_the_reason_is_given_in_words(monkeypatch):
    kernels._fused.cache_clear()
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_missing", "no such file")
    try:
        assert kernels.backend([torch.ones(1)], None) is chunked
        reason = r"the C extension ebu_optim\.kernels\._cpu was not built .*\(no such file\)"
        assert kernels.active().startswith("reference (plain torch): the C extension")
        with pytest.raises(RuntimeError, match="fused=True, but " + reason):
            kernels.backend([torch.ones(1)], True)
    finally:
        kernels._fused.cache_clear()


@built
def test_what_the_extension_serves():
    assert kernels.active() == "cpu (fused)"
    for dtype in DTYPES[:3]:
        assert kernels.backend([torch.ones(1, dtype=dtype)], True) is cpu
    assert kernels.backend([torch.ones(1).double()], None) is chunked
    with pytest.raises(RuntimeError, match="do not support float64"):
        kernels.backend([torch.ones(1).double()], True)
