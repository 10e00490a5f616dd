"""The same ways at small sizes, under pytest-benchmark: `make bench`, or

    pytest tests/benchmarks/test_bench.py --benchmark-compare

bench_step.py has the sizes that matter, the limits and the memory.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

import bench_step
import shapes
import torch
import ways

from ebu_optim.kernels import backend, chunked, reference

MODULES = {"fused": None, "reference": False}  # as the argument `fused`
SHAPES = {
    "1e5": shapes.parts(10**5, 1),
    "1e6": shapes.parts(10**6, 1),
    "1e6 in 1000 tensors": shapes.parts(10**6, 1000),
}


@pytest.fixture(params=SHAPES)
def sizes(request):
    return SHAPES[request.param]


@pytest.fixture(params=MODULES)
def module(request):
    chosen = backend([torch.zeros(1)], MODULES[request.param])
    if request.param == "fused" and chosen is chunked:
        pytest.skip("no fused kernels here: the reference serves")
    return chosen


@pytest.mark.parametrize("way", ["kthvalue", "partition", "bisection"])
def test_other_selection(benchmark, sizes, way):
    grads = bench_step.normal(sizes, 0)
    k = ways.rank(sum(g.numel() for g in grads))
    found = benchmark(getattr(ways, way), grads, k)
    assert float(found) == float(ways.engine(reference, grads, k))


def test_selection(benchmark, sizes, module):
    grads = bench_step.normal(sizes, 0)
    k = ways.rank(sum(g.numel() for g in grads))
    assert float(benchmark(ways.engine, module, grads, k)) == float(ways.kthvalue(grads, k))


def test_combination(benchmark, sizes, module):
    names = ("params", "g_f", "g_r", "anchors", "fishers")
    x = {name: bench_step.normal(sizes, seed) for seed, name in enumerate(names)}
    k = ways.rank(sum(g.numel() for g in x["g_f"]))
    keys, _ = module.select([(x["g_f"], k), (x["g_r"], k)], torch.float32)
    out = [torch.full_like(g, torch.nan) for g in x["g_r"]]
    benchmark(ways.combine, module, x, out, keys)
    taus = [reference.key_to_value(key, torch.float32) for key in keys]
    for row, found in zip(zip(*(x[n] for n in names), strict=True), out, strict=True):
        torch.testing.assert_close(found, ways.chain(*row, *taus))


@pytest.mark.parametrize("side", bench_step.SIDES)
def test_step(benchmark, sizes, side):
    stepper = bench_step.SIDES[side](sizes)
    g_f, g_r = bench_step.normal(sizes, 1), bench_step.normal(sizes, 2)

    def gradients():
        return ([g.clone() for g in g_f], [g.clone() for g in g_r]), {}

    before = stepper.params[0].detach().clone()
    benchmark.pedantic(stepper.step, setup=gradients, rounds=20, warmup_rounds=1)
    assert not stepper.params[0].equal(before)
