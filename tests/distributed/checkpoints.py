"""Checkpoints of a run on several ranks; what happened goes to a file per rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import AdamW

from ebu_optim import EBUOptimizer
from ebu_optim.checkpoint import load_checkpoint, save_checkpoint

from ..steps import assert_same, snapshot
from .launch import join, leave

try:
    from torch.distributed.tensor import Shard, distribute_tensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import Shard, distribute_tensor


def build() -> dict[str, Any]:
    torch.manual_seed(0)
    m = DDP(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 2)))
    torch.manual_seed(10 + dist.get_rank())  # every rank draws its own
    return {"m": m, "opt": EBUOptimizer(AdamW(m.parameters(), lr=1e-2))}


def train(run: dict[str, Any], steps: int) -> Any:
    m, opt = run["m"], run["opt"]
    for _ in range(steps):
        for phase, sign in ((opt.forget, 1), (opt.remember, -1)):
            with phase():
                (m(torch.randn(4, 6)) - sign).square().mean().backward()
        opt.step()
    return snapshot(opt, m), torch.rand(1)


def error_of(do: Any) -> str:
    try:
        do()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "none"


if __name__ == "__main__":
    join()
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    run = build()
    train(run, 3)
    save_checkpoint(folder / "run", 3, run)
    whole = train(run, 3)
    again = build()
    assert load_checkpoint(folder / "run", again) == 3
    assert_same(train(again, 3), whole)

    errors = {}
    (folder / "file").touch()
    errors["rank 0 cannot write"] = error_of(lambda: save_checkpoint(folder / "file", 6, run))
    shard = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
    errors["shards"] = error_of(lambda: save_checkpoint(folder / "run", 6, {"a": {"t": shard}}))
    before = snapshot(run["opt"], run["m"])
    mine = folder / ("run" if rank == 0 else "none")  # a disk that is not shared
    errors["another folder"] = error_of(lambda: load_checkpoint(mine, run))
    other = {**run, "m": nn.Linear(1, 1)} if rank == 1 else run
    errors["rank 1 has another model"] = error_of(lambda: load_checkpoint(folder / "run", other))
    assert_same(snapshot(run["opt"], run["m"]), before)
    dist.barrier()
    if rank == 0:
        (folder / "run" / "step_00000003" / "m.pt").write_bytes(b"half")
    dist.barrier()
    errors["damaged"] = error_of(lambda: load_checkpoint(folder / "run", run))
    torch.save(errors, folder / f"{rank}.pt")
    leave()
