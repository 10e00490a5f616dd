"""A tiny network with two losses, and the comparisons that the optimizer's tests share."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop

from ebu_optim import EBUOptimizer

# named parameters in an optimizer came with torch 2.6
HAS_NAMES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
NAMES = pytest.mark.skipif(
    not HAS_NAMES,
    reason="optimizers know the names of their parameters from torch 2.6 on",
)
BASES = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adam_tensor_lr": lambda p: Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adamw": lambda p: AdamW(p, lr=0.01),
    "adamw_foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, alpha=0.9, momentum=0.5),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
    "nadam": lambda p: NAdam(p, lr=0.01),
    "asgd": lambda p: ASGD(p, lr=0.05, t0=2),
    "rprop": lambda p: Rprop(p, lr=0.01),
    "schedulefree": lambda p: AdamWScheduleFree(p, lr=0.05, warmup_steps=2),
}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def loss(m: nn.Module, i: int, forget: bool, rows: slice = slice(None)) -> Tensor:
    """A sum over the rows, so that the losses of micro-batches add up to that of the batch."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2 * i + forget))[rows]
    x = x.to(next(m.parameters()).dtype)
    return (m(x) - (1 if forget else -1)).square().sum() / 6


def phases(opt: EBUOptimizer, m: nn.Module, i: int = 0) -> None:
    with opt.forget():
        loss(m, i, True).backward()
    with opt.remember():
        loss(m, i, False).backward()


def run(opt: EBUOptimizer, m: nn.Module, steps: range, then: Optimizer | None = None) -> None:
    for i in steps:
        phases(opt, m, i)
        (then or opt).step()


def params(m: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in m.parameters()]


def snapshot(opt: EBUOptimizer, m: nn.Module) -> dict[str, Any]:
    """Everything that a step may change: weights, base state, anchor, Fisher, counters, stats."""
    return copy.deepcopy({"params": params(m), "state": opt.state_dict(), "stats": opt.stats})


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit, dtypes included, all the way down."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: off by up to {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}/{i}")
    else:
        nan = isinstance(a, float) and math.isnan(a) and math.isnan(b)
        assert nan or a == b, f"{where}: {a} != {b}"


def bare(name: str, m: nn.Module) -> Optimizer:
    base = BASES[name](m.parameters())
    if name == "schedulefree":
        base.train()
    return base


def build(name: str = "adam", fisher: str = "online", fresh: bool = False, **options):
    """A network and its wrapper; a fresh one is what a resuming script builds before it loads."""
    m = net()
    given = {"none": None, "fixed": {p: p.detach().abs() + fresh for p in m.parameters()}}
    opt = EBUOptimizer(
        bare(name, m), fisher=given.get(fisher, "online"), **{"gamma": 3.0, **options}
    )
    if fisher.startswith("warm") and not fresh:
        batches = [lambda i=i: loss(m, i, False).backward() for i in (90, 91, 92)]
        opt.warmup_fisher(batches, freeze=fisher == "warm")
    return m, opt


def closures(m: nn.Module, i: int = 0):
    def run_one(forget: bool):
        value = loss(m, i, forget)
        value.backward()
        return value.detach()

    return lambda: run_one(True), lambda: run_one(False)


def assert_as_if_nothing_had_happened(opt: EBUOptimizer, m: nn.Module) -> None:
    assert_same(params(m), params(net()))
    n, other = build()
    for o, model in ((opt, m), (other, n)):
        run(o, model, range(2))
    assert_same(snapshot(opt, m), snapshot(other, n))
