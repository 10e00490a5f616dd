"""The fused CPU kernels against one plain read and one plain copy of the same memory.

    python tests/benchmarks/bench_cpu.py --select 1e8 --combine 3.5e7

Rounds are interleaved in one process; the figures are medians. `--cpu-time` counts the seconds that
this process computed instead of those that passed: with `--threads 1`, a figure that other load on
the machine disturbs little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ebu_optim.kernels import active, cpu, reference


def medians(
    rounds: int, clock: Callable[[], float], work: dict[str, Callable[[], object]]
) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, run in work.items():
            start = clock()
            run()
            if i:  # the first round warms up
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def selection(n: int, tensors: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    parts, k = list(x.tensor_split(tensors)), n // 2
    assert cpu._select([([x], k)], torch.float32)[2] == ["bracket"]
    whole = cpu._List([x])
    threads = torch.get_num_threads()
    return {
        "plain read (torch.sum)": lambda: x.sum(),
        "selection": lambda: cpu.select([([x], k)], torch.float32),
        f"selection, {tensors} tensors": lambda: cpu.select([(parts, k)], torch.float32),
        f"selection, {tensors} pools": lambda: cpu.select(
            [([p], (len(p) + 1) // 2) for p in parts], torch.float32
        ),
        "fallback (radix)": lambda: cpu._cpu.radix(*whole.arguments(), k, threads),
    }


def combination(n: int) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    theta, g_f, g_r, anchor, fisher = (torch.randn(n, generator=g) for _ in range(5))
    fisher.square_()
    target = torch.zeros(n)
    taus, _ = cpu.select([([g_f], n // 2), ([g_r], n // 2)], torch.float32)

    def combine(online: float | None) -> None:
        # G in place of g_r, as in a step; with these terms it stays as large as it is
        cpu.combine(
            [theta], [g_f], [g_r], [anchor], [fisher], [g_r], [None], taus, [0], [1], alpha=0.6,
            gamma=1e-3, penalty="partial", update="added", terms=(False, True, False),
            online=online, inv_scale=None, dtype=torch.float32,
            stats=torch.zeros(len(reference.STATS), dtype=torch.float64),
        )  # fmt: skip

    return {
        "plain copy": lambda: target.copy_(theta),
        "combination": lambda: combine(None),
        "combination, online Fisher": lambda: combine(0.5),
    }


BYTES = {"plain copy": 8, "combination": 24, "combination, online Fisher": 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--select", type=float, default=1e8, help="scalars")
    parser.add_argument("--combine", type=float, default=3.5e7, help="scalars")
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--lanes", choices=["avx512", "avx2", "base"], help="default: the best")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if cpu.available():
        parser.error(active())
    lanes = cpu._cpu.lanes(args.lanes)
    clock = time.process_time if args.cpu_time else time.perf_counter
    n, m = int(args.select), int(args.combine)
    print(f"{args.threads} threads, {lanes}, {'processor' if args.cpu_time else 'wall'} time")
    select = medians(args.rounds, clock, selection(n, args.tensors))
    read = select["plain read (torch.sum)"]
    for name, t in select.items():
        print(f"{name:28}{1e3 * t:9.2f} ms {t / read:7.2f} x one read")
    combine = medians(args.rounds, clock, combination(m))
    copy = BYTES["plain copy"] * m / combine["plain copy"]
    for name, t in combine.items():
        rate = BYTES[name] * m / t
        print(f"{name:28}{1e3 * t:9.2f} ms {rate / 1e9:7.1f} GB/s {rate / copy:6.2f} of copy")
    result = {
        "select": {"n": n, "tensors": args.tensors, "seconds": select},
        "combine": {"n": m, "seconds": combine, "bytes_per_scalar": BYTES},
        "threads": args.threads, "lanes": lanes, "cpu_time": args.cpu_time, "rounds": args.rounds,
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
