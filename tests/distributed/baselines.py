"""What every rank runs: each baseline under DistributedDataParallel or as shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ebu_optim.baselines import methods
from ebu_optim.optim import PhasedOptimizer

from ..optim.test_rule import Agreeing
from ..torchjd import WEIGHTINGS, lacks
from .launch import join, leave

STEPS = 3
OWN = "a rule of one's own"
# every weighting of TorchJD's goes the way of the first
NAMES = [*(n for n in methods if not n.startswith("ebu_") and n not in [*WEIGHTINGS][1:]), OWN]
NAMES = [n for n in NAMES if not lacks(n)]
OPTIONS: dict[str, Any] = {
    "selective_amnesia": {"fisher": "online", "fisher_scale": "unit"},
    "salun": {"delta": 0.3},
    "erasediff": {"eta": 0.5},
}


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss(m: nn.Module, i: int, name: str) -> torch.Tensor:
    rank, size = world()
    generator = torch.Generator().manual_seed(2 * i + (name == "forget"))
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)[rank::size]
    return (m(x) - (1 if name == "forget" else -1)).square().sum() * size / 8


def train(name: str, wrap: str, order: tuple[str, ...]) -> list[dict[str, Any]]:
    """Weights and figures, step by step; `order` may hold a phase that the method does not need."""
    m = net()
    if dist.is_initialized():
        if wrap == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(m)
        else:
            m = DDP(m, gradient_as_bucket_view=True)
    base = torch.optim.Adam(m.parameters(), lr=0.01)
    if name == OWN:
        opt = PhasedOptimizer(base, Agreeing(w=0.5), max_grad_norm=0.5)
    else:
        opt = methods[name].build(base, max_grad_norm=0.5, **OPTIONS.get(name, {}))
    history = []
    for i in range(STEPS):
        for phase in order:
            with getattr(opt, phase)():
                loss(m, i, phase).backward()
        opt.step()
        weights = [p.detach() for p in m.parameters()]
        weights = [(p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for p in weights]
        history.append({"weights": weights, "stats": opt.stats})
    return history


def nonfinite(name: str) -> dict[str, Any]:
    """One element of one rank's part of the first gradient is not a number, in the first step."""
    from torch.distributed.fsdp import fully_shard

    m = net()
    fully_shard(m)
    opt = methods[name].build(torch.optim.SGD(m.parameters(), lr=0.1), nonfinite="raise")
    errors = []
    for i in range(2):
        for phase in ("forget", "remember"):
            with getattr(opt, phase)():
                loss(m, i, phase).backward()
                if (i, phase, world()[0]) == (0, "forget", 1):
                    next(m.parameters()).grad.to_local().view(-1)[0] = torch.nan
        try:
            opt.step()
        except RuntimeError as e:
            errors.append(str(e))
    return {"errors": errors, "weights": [p.detach().full_tensor() for p in m.parameters()]}


def refused() -> str:
    try:
        train("random_masks", "fsdp", ("forget", "remember"))
    except TypeError as e:
        return str(e)
    return "not refused"


def main() -> None:
    join()
    orders = {"fr": ("forget", "remember"), "rf": ("remember", "forget")}
    results: dict[str, Any] = {
        f"{name} ddp {o}": train(name, "ddp", order)
        for name in NAMES
        for o, order in orders.items()
    }
    if sys.argv[2:] == ["fsdp"]:
        for name in NAMES:
            if name != "random_masks":
                results[f"{name} fsdp fr"] = train(name, "fsdp", orders["fr"])
        results |= {f"nan {name}": nonfinite(name) for name in ("joint", "salun")}
        results["refused"] = refused()
    torch.save(results, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main()
