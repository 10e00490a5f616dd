"""Start real processes: gloo, CPU, one thread each.

A rank is a fork of a server that has imported torch once, as every rank of torchrun would by
itself: seconds of work each, and on a busy machine minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..processes import PATIENCE, ROOT

# not the scenarios' own modules, which a rank runs as torchrun would
IMPORTED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "ebu_optim.checkpoint",
    __name__,
]


class Launched(NamedTuple):
    codes: list[int | None]
    said: str


def launch(ranks: int, module: str, *arguments: object, alone: bool = False) -> Launched:
    """`python -m tests.distributed.MODULE ARGUMENTS` as so many ranks.

    A rank that fails ends the others, as torchrun does it, unless each is left `alone`. Exit codes
    are those of os.waitstatus_to_exitcode, rank by rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    until = time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, folder, f"{__package__}.{module}", [*map(str, arguments)])
        processes = [context.Process(target=_rank, args=(i, *given)) for i in range(ranks)]
        running = {}
        try:
            for process in processes:
                process.start()
                running[process.sentinel] = process
            failed = False
            while running and not (failed and not alone):
                ended = wait(running, until - time.monotonic())
                for sentinel in ended:
                    running[sentinel].join()
                    failed |= running.pop(sentinel).exitcode != 0
                if not ended:
                    raise AssertionError(f"still running after {PATIENCE} s:\n{_said(folder)}")
        finally:
            for process in running.values():
                process.kill()
                process.join()
        return Launched([process.exitcode for process in processes], _said(folder))


def _said(folder: str) -> str:
    return "\n".join(f"{f.stem}:\n{f.read_text()}" for f in sorted(Path(folder).glob("*.log")))


def _rank(rank: int, ranks: int, folder: str, module: str, arguments: list[str]) -> None:
    log = os.open(f"{folder}/rank {rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(ROOT)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TESTS_STORE": f"{folder}/store",
    }
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__")


def join(timeout: float = PATIENCE) -> None:
    """Be a rank of `launch`, once all of them are there: `timeout` is of what they do together."""
    ranks = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["TESTS_STORE"], ranks)
    store.add("here", 1)
    while store.add("here", 0) < ranks:
        time.sleep(0.01)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )


def leave() -> None:
    """End a rank whose results are on disk. The interpreter's own end now and then aborts in a
    thread of torch's ("terminate called without an active exception")."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def outcomes(ranks: int, module: str, folder: Path, *arguments: object) -> list[dict]:
    """What each rank of `module` left in FOLDER."""
    done = launch(ranks, module, folder, *arguments)
    assert not any(done.codes), done.said
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
