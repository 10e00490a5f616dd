"""Medians of interleaved rounds in one process, and the memory that a call takes."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebu_optim.kernels import active, cpu

SLOW = 1.0  # seconds: a call that takes longer is measured once, and without a warm-up
STATUS = Path("/proc/self/status")


def resident(key: str) -> int:
    """VmRSS or VmHWM in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {key}")


def fresh(run: Callable[[], Any]) -> tuple[float, int | None, Any]:
    """Seconds, the bytes that a call takes at its peak beyond what was held before it (None where
    the system is not Linux), and its result."""
    linux = STATUS.exists()
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # what the process holds without need is fresh to a call
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident size
        before = resident("VmRSS")
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return seconds, max(0, resident("VmHWM") - before) if linux else None, result


class Others:
    """How many cores other processes kept busy since this was made, on average."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        busy = 0.0
        if (stat := Path("/proc/stat")).exists():
            user, nice, system, _, _, irq, softirq, steal = map(
                int, stat.read_text().split("\n")[0].split()[1:9]
            )
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time(), time.perf_counter()

    def cores(self) -> float:
        busy, now = self._now()
        return max(0.0, (busy - self.start[0]) / (now - self.start[1]))


def measure(
    ways: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    check: Callable[[str, Any], None] = lambda name, result: None,
) -> dict[str, dict[str, Any]]:
    """`seconds`, `calls` (how many they are the median of), `fresh_bytes` and `others` (cores that
    other processes kept busy in these rounds) of every way.

    `check` sees the result of each way's first call.
    """
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, run in ways.items():
        if name.startswith("torch.compile"):
            run()  # compiles
        seconds, taken, result = fresh(run)
        check(name, result)
        del result
        if seconds < SLOW:  # the first call brings in libraries
            taken = fresh(run)[1]
        found[name] = {"fresh_bytes": taken}
        times[name] = [seconds] if seconds >= SLOW else []
    quick = [name for name in ways if not times[name]]
    others = Others()
    for _ in range(rounds):
        for name in quick:
            start = clock()
            ways[name]()
            times[name].append(clock() - start)
    load = others.cores()
    for name, t in times.items():
        found[name] |= {"seconds": statistics.median(t), "calls": len(t), "others": load}
    return found


def available() -> int:
    """Bytes of memory that are free."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def machine() -> dict[str, Any]:
    names = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": f"{names[0] if names else platform.machine()}, {len(names)} cores",
        "kernels": active(),
        "lanes": None if cpu.available() else cpu._cpu.lanes(None),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
