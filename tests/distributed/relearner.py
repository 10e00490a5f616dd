"""A relearner on every rank: `launch(2, "relearner", FOLDER)`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from ebu_optim.baselines import Joint
from ebu_optim.diffusion import Relearner

from .launch import join, leave


def trained(parts: int, part: int | None) -> tuple[Tensor, Tensor]:
    """The weights after two steps, and where the relearner's last steps led; on the mean of the
    losses of so many parts, or on one of them."""
    torch.manual_seed(0)
    raw = nn.Linear(4, 2).double()
    model = raw if part is None else DistributedDataParallel(raw)
    opt = Joint(SGD(raw.parameters(), lr=0.1))
    relearner = Relearner(raw.parameters(), steps=3, lr=0.05)
    x = torch.randn(parts, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    x = x if part is None else x[part : part + 1]
    for step in range(2):

        def loss(by: nn.Module, towards: float, step: int = step) -> Tensor:
            return (by(x) - towards - step).square().sum((1, 2)).mean()

        with opt.forget():
            moved = relearner.loss(lambda: loss(raw, 1.0), lambda: loss(raw, -1.0))
            (loss(model, 1.0) + moved).backward()
        with opt.remember():
            loss(model, 0.0).backward()
        opt.step()
    with relearner.moved(lambda: loss(raw, -1.0)):
        far = raw.weight.detach().clone()
    return raw.weight.detach().clone(), far


if __name__ == "__main__":
    join()
    found = trained(dist.get_world_size(), dist.get_rank())
    torch.save(found, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
