"""An adversary on every rank: `launch(2, "adversary", FOLDER)`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ebu_optim.diffusion import Adversary

from .launch import join, leave

CALLS = 5


def trained(parts: int, part: int | None) -> torch.Tensor:
    """Vectors after some calls, against the mean of so many quadratic losses, or one of them."""
    torch.manual_seed(0)
    table = nn.Embedding(6, 4).double()
    adversary = Adversary(table, [1], steps=2, restart=3, count=2, seed=5)
    for call in range(CALLS):
        targets = torch.arange(4.0 * parts).view(parts, 4) + call

        def attack(label: int, _: torch.Generator, targets=targets) -> torch.Tensor:
            at = table(torch.tensor([label]))
            mine = targets if part is None else targets[part : part + 1]
            return (at - mine).square().mean(0).sum()

        adversary.step(attack)
    return torch.stack(adversary.vectors).detach()


if __name__ == "__main__":
    join()
    found = trained(dist.get_world_size(), dist.get_rank())
    drawn = torch.zeros(2)
    table = nn.Embedding(2, 1)

    def noted(label: int, generator: torch.Generator) -> torch.Tensor:
        drawn.copy_(torch.randn(2, generator=generator))
        return table(torch.tensor([label])).sum()

    Adversary(table, [1], steps=1).step(noted)
    torch.save({"vectors": found, "drawn": drawn}, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
