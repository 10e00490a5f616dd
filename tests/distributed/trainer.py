"""A rank of `tests.trainers`: `launch` starts what lies in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ..trainers import joined
from .launch import join, leave

if __name__ == "__main__":
    join()
    folder = Path(sys.argv[1])
    torch.save(joined(folder / "out", 2), folder / f"{torch.distributed.get_rank()}.pt")
    leave()
