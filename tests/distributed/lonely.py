"""A rank that dies, or stays away from a step; the others have 5 seconds of patience, which begin
when all of them are there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from .launch import join
from .training import backward, build, loss

what, folder = sys.argv[1], Path(sys.argv[2])
join(timeout=5)
rank = dist.get_rank()
m, opt = build()
backward(opt, m, 0)
opt.step()
try:
    if rank != 1:
        backward(opt, m, 1)
        opt.step()
    elif what == "dies":
        with opt.forget():
            loss(m, 1, True).backward()
        os._exit(7)
    elif what == "stays away":  # both phases, and no step
        backward(opt, m, 1)
        while not (folder / "0.txt").exists():
            time.sleep(0.05)
except RuntimeError as e:
    (folder / f"{rank}.txt").write_text(str(e))
    raise
