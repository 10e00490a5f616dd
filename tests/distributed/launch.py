"""Start real processes: torchrun, gloo, CPU, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Ours, with the package found, one thread a process and no GPU."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def torchrun(
    ranks: int, *arguments: object, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """A hang is an error after `timeout` seconds; torchrun ends its workers with itself."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            raise AssertionError(f"still running after {timeout} s:\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, "")


def leave() -> None:
    """End a rank whose results are on disk. The interpreter's own end now and then aborts in a
    thread of torch's ("terminate called without an active exception")."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def scenarios(ranks: int, folder: Path, names: list[str]) -> list[dict[str, object]]:
    """What the named scenarios of `worker` returned, rank by rank."""
    done = torchrun(ranks, "--module", "tests.distributed.worker", folder, *names)
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
