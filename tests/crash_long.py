"""Long runs that get a SIGINT, as Ctrl-C sends it, and are started again.

    python -m tests.crash_long FOLDER

As in `crash_loop`, every life is a fork of this process, which imports everything once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn

from ebu_optim import DiagonalFisher
from ebu_optim.diffusion import sample_set

from .crash_loop import life
from .models import schedule, tiny_unet

STOP_AT = [0]  # how many lines of a log; of a life that is interrupted there


def tick(log: Path, line: str) -> None:
    """A line into the log; where it is the last before the signal, that is waited for."""
    with log.open("a") as f:
        f.write(f"{line}\n")
    while len(log.read_text().splitlines()) == STOP_AT[0]:
        time.sleep(0.01)


class Batches:
    """Twelve batches; each one handed out leaves a line in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tick(self.log, str(i))
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.randn(4, 5, generator=generator)}


def fisher(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(m: Any, batch: Any) -> torch.Tensor:
        return m(batch["x"]).square().mean(1)

    DiagonalFisher.estimate(
        model, loss, Batches(path.with_suffix(".log")), method="hooks", path=path, progress=False
    )


def replay(path: Path) -> None:
    model = tiny_unet()

    model.register_forward_pre_hook(lambda *_: tick(path.with_suffix(".log"), "x"))
    sample_set(
        path,
        model,
        DDIMScheduler.from_config(schedule().config),
        torch.arange(12) % 5,
        (1, 8, 8),
        num_inference_steps=3,
        batch_size=2,
    )


def lines(path: Path) -> int:
    log = path.with_suffix(".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def interrupted(do: Callable[[Path], None], path: Path, after: int) -> None:
    """SIGINT once `after` lines are in the log; exits 3 on KeyboardInterrupt, like nothing else."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this process inherited
        STOP_AT[0] = after
        try:
            do(path)
        except KeyboardInterrupt:
            os._exit(3)

    def when() -> None:
        while lines(path) < after:
            time.sleep(0.005)

    status = life(run, when, signal.SIGINT)
    assert status == 3, status


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    for what, after in ((fisher, (5, 9)), (replay, (8, 14))):
        for name, moments in (("whole", ()), ("stopped", after)):
            path = where / f"{what.__name__}_{name}.safetensors"
            for moment in moments:
                interrupted(what, path, moment)
                assert not path.exists()
            assert life(lambda path=path, what=what: what(path)) == 0
