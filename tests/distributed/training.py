"""A small network with two losses, trained as one process or as one rank of several."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ebu_optim import EBUOptimizer

STEPS = 5
# how the model is wrapped
WRAPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "view": {"gradient_as_bucket_view": True},
    "tiny": {"bucket_cap_mb": 1e-6},
    "view+tiny": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-6},
    "static": {"static_graph": True},
    "static+view": {"static_graph": True, "gradient_as_bucket_view": True},
    "static+view+tiny": {
        "static_graph": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 1e-6,
    },
    "unused": {"find_unused_parameters": True},
    "unused+view+tiny": {
        "find_unused_parameters": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 1e-6,
    },
    "static+branches": {"static_graph": True},
    "static+subset": {"static_graph": True},
    "subset": {},
}
BRANCHES = ("unused", "unused+view+tiny", "static+branches")
# torch or the rank checks refuse these
REFUSED = ("static+branches", "static+subset", "subset")
EQUAL = tuple(w for w in WRAPS if w not in REFUSED)
# phases of one step; of several micro-batches all but the last of a phase run under no_sync
ORDERS = ("rf", "ffrr", "frfr", "rffr", "rrff")


class Net(nn.Module):
    """Two heads. In "branches" each loss uses one of them, in "subset" the remember loss does."""

    def __init__(self, kind: str = "", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
            self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.kind = kind
        self.to(dtype)

    def forward(self, x: Tensor, forget: bool) -> Tensor:
        x = self.body(x)
        if self.kind == "branches" or (self.kind == "subset" and not forget):
            return self.heads[forget](x)
        return self.heads[0](x) - self.heads[1](x)


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def loss(m: nn.Module, i: int, forget: bool, part: int = 0, parts: int = 1) -> Tensor:
    """Of this rank's share of micro-batch `part`; the mean over the ranks is the joined batch's."""
    rank, size = world()
    inner = m.module if isinstance(m, DDP) else m
    generator = torch.Generator().manual_seed(2 * i + forget)
    x = torch.randn(24, 4, generator=generator).to(inner.body[0].weight.dtype)
    x = x[part::parts][rank::size]
    return (m(x, forget) - (1 if forget else -1)).square().sum() * size / 24


def build(wrap: str | None = "plain", dtype: torch.dtype = torch.float64, **options: Any):
    kind = (
        "branches" if wrap in BRANCHES else "subset" if wrap in ("subset", "static+subset") else ""
    )
    m: nn.Module = Net(kind, dtype)
    if dist.is_initialized() and wrap:
        m = DDP(m, **WRAPS[wrap])
    base = torch.optim.Adam(m.parameters(), lr=0.01)
    return m, EBUOptimizer(base, **{"gamma": 3.0, "max_grad_norm": 0.5, **options})


def backward(opt: EBUOptimizer, m: nn.Module, i: int, order: str = "fr", factor: Any = 1) -> None:
    """The phases of one step."""
    for j, phase in enumerate(order):
        part, parts = order[:j].count(phase), order.count(phase)
        last = part == parts - 1
        with opt.forget() if phase == "f" else opt.remember():
            sync = nullcontext() if last or not isinstance(m, DDP) else m.no_sync()
            with sync:
                (loss(m, i, phase == "f", part, parts) * factor).backward()


def train(
    wrap: str | None = "plain", order: str = "fr", dtype=torch.float64, warmup=False, **options
):
    """Weights, figures and masks after every step."""
    m, opt = build(wrap, dtype, **options)
    if warmup:
        batches = [lambda i=i: loss(m, i, False).backward() for i in (90, 91)]
        opt.warmup_fisher(batches)
    history = []
    for i in range(STEPS):
        backward(opt, m, i, order)
        grads = []
        for phase in (opt.forget, opt.remember):
            with phase():
                grads.append([p.grad.clone() for p in m.parameters() if p.grad is not None])
        opt.step()
        masks = [
            (g.abs() >= tau) & (g != 0)
            for gs, tau in zip(grads, opt.stats["thresholds"], strict=True)
            for g in gs
        ]
        weights = [p.detach().clone() for p in m.parameters()]
        fisher = [opt.fisher_of(p).clone() for p in m.parameters()]
        history.append({"weights": weights, "fisher": fisher, "stats": opt.stats, "masks": masks})
    return history
