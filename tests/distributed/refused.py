"""Parameters that are refused, on every rank: the refusals go to a file per rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ebu_optim import EBUOptimizer

from .launch import join, leave

CPU = torch.device("cpu")


def fsdp1(use_orig_params: bool) -> None:
    m = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=use_orig_params, device_id=CPU)
    EBUOptimizer(torch.optim.SGD(m.parameters(), lr=1.0))


def fsdp1_afterwards() -> None:
    m = nn.Linear(4, 4)
    opt = EBUOptimizer(torch.optim.SGD(m.parameters(), lr=1.0))
    FullyShardedDataParallel(m, use_orig_params=True, device_id=CPU)
    opt.forget().__enter__()


def dtensor() -> None:
    from torch.distributed._tensor import Shard, distribute_tensor
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    EBUOptimizer(torch.optim.SGD([p], lr=1.0))


CASES = {
    "FSDP1": lambda: fsdp1(False),
    "FSDP1 with use_orig_params": lambda: fsdp1(True),
    "FSDP1 after the optimizer": fsdp1_afterwards,
}
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
    CASES["DTensor before torch 2.6"] = dtensor

if __name__ == "__main__":
    join()
    refusals = {}
    for name, case in CASES.items():
        try:
            case()
        except (TypeError, ImportError) as e:
            refusals[name] = f"{type(e).__name__}: {e}"
    torch.save(refusals, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
