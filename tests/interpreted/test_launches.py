"""What is launched for a step, and when tables are made: `_launch*` and `_triton_kernels`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ebu_optim.kernels import _launch, _launch_plan, _tables, reference
from ebu_optim.kernels import triton as fused
from ebu_optim.kernels.contract import Columns, Update

from ..inputs import ADDED, total
from .shared import combine


class Recorded(TorchDispatchMode):
    """The operations that would start something on a device, or wait for it."""

    FREE = ("empty", "split", "view", "slice", "unbind", "select", "detach", "alias", "as_strided")

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.lstrip("_").startswith(self.FREE):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))


def step(theta, g_f, g_r, fisher, granularity="model"):
    n = len(theta)
    if granularity == "model":
        pools = [(g_f, total(g_f) // 2), (g_r, total(g_r) // 2)]
        first, second = [0] * n, [1] * n
    else:
        pools = [([g], max(1, g.numel() // 2)) for g in (*g_f, *g_r)]
        first, second = range(n), range(n, 2 * n)
    keys, _ = fused.select(pools, torch.float32)
    fused.combine(
        Columns(theta, g_f, g_r, theta, fisher, g_r, [None] * n, first, second),
        keys,
        Update(ADDED, 1.0, None, None, torch.float32),
        torch.zeros(len(reference.STATS), dtype=torch.float64),
    )


@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("count", [1, 100, 10_000])
def test_small_models_take_eight_launches_and_no_wait_whatever_the_number_of_tensors(
    launched, count, granularity
):
    columns = [list(torch.randn(100_000).split(100_000 // count)) for _ in range(4)]
    step(*columns, granularity)  # the tables are made once
    launched.clear()
    with Recorded() as recorded:
        step(*columns, granularity)
    assert launched == ["digit_kernel"] * 4 + ["finish_kernel", "combine_kernel", "reduce_kernel"]
    assert recorded.ops == ["zeros", "zeros"]  # one of them is this test's stats


def test_large_models_launch_the_window_and_the_fallback_without_asking(launched, monkeypatch):
    monkeypatch.setattr(_launch_plan, "WINDOW_MIN", 1000)
    columns = [list(torch.randn(2000).split(500)) for _ in range(4)]
    step(*columns)
    window = ["sample", "bracket", "window", "fold", "settle"]
    radix = ["digit"] * 4 + ["finish"]
    assert launched == [f"{n}_kernel" for n in (*window, *radix, "combine", "reduce")]


def test_tables_are_made_again_only_where_an_address_or_a_rank_changed(monkeypatch):
    uploads, upload = [], _tables.upload
    monkeypatch.setattr(_tables, "upload", lambda *args: uploads.append(1) or upload(*args))
    g = [torch.randn(50), torch.randn(70)]
    for _ in range(3):
        fused.select([(g, 60)], torch.float32)
        g[0] += 1  # another value in the same place
    assert len(uploads) == 1
    keys, _ = fused.select([(g, 61)], torch.float32)
    assert len(uploads) == 2
    assert keys.equal(reference.select([(g, 61)], torch.float32)[0])
    moved = [g[0].clone(), g[1]]
    fused.select([(moved, 61)], torch.float32)
    assert len(uploads) == 3
    monkeypatch.setattr(_tables, "_KEPT", 2)
    for k in range(1, 6):
        fused.select([(g, k)], torch.float32)
    assert len(_tables._cache) == 2


def test_kernels_are_reached_under_one_name_each():
    folder = Path(_launch.__file__).parent
    text = "".join(path.read_text() for path in folder.glob("_triton_*.py"))
    named = set(re.findall(r"^def (\w+_kernel)\(", text, re.M))
    assert named == {name for name in vars(_launch.kernels()) if name.endswith("_kernel")}


def test_addresses_past_32_bits():
    """Elements behind the 2**31st of one allocation, of which few pages are ever touched."""
    far = 2**31 + 5
    try:
        whole = torch.empty(far + 1000, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    tail = whole[far:]
    tail.copy_(torch.randn(1000))
    pools = [([tail], 321)]
    want = reference.select([([tail.clone()], 321)], torch.float32)[0]
    assert fused.select(pools, torch.float32)[0].equal(want)
    theta, g_f = torch.randn(1000).half(), torch.randn(1000).half()
    out, *_ = combine([theta], [g_f], [tail], out=[tail])
    expected, *_ = combine([theta], [g_f], [tail.clone().copy_(tail)], kernels=reference)
    assert out[0] is tail
    assert not tail.isnan().any()
    assert len(expected) == 1
