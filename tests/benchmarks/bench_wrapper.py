"""What the wrapper adds to a step of fused AdamW, by number of scalars and of tensors.

    python tests/benchmarks/bench_wrapper.py --json bench_wrapper.json --plot wrapper.png

*Wrapper* is entering and leaving both phases, `step` and `zero_grad` of an EBUOptimizer with its
default options, without its base; *AdamW* the fused step of that base on the same tensors; *floor*
the 64.4 bytes a scalar of the whole step (docs/benchmarks.md) at the speed of a plain copy. Rounds
are interleaved, the figures medians, every case and number of threads is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import report
import shapes
import torch
from bench_step import FLOORS, Case, apart, normal
from measure import Others, machine

from ebu_optim import EBUOptimizer

SIZES, TENSORS = ("1e5", "1e6", "3.5e7", "1e8"), (1, 145, 686, 1000, 10_000)
GOALS = {"wrapper": 1.5, "floor": 1.15}


class Timed(torch.optim.AdamW):
    """Says how long its own step took."""

    seconds = 0.0

    def step(self, closure: Any = None) -> Any:
        start = time.perf_counter()
        result = super().step(closure)
        self.seconds = time.perf_counter() - start
        return result


def case(size: str, tensors: int, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(threads)
    n = int(float(size))
    row = {"n": n, "tensors": tensors, "threads": threads}
    sizes = shapes.parts(n, tensors)
    room = Case("step", size, argparse.Namespace(threads=threads, cpu_time=False), [])
    if reason := room.memory(40 * n):
        return {**row, "left_out": reason}
    params = [torch.nn.Parameter(t) for t in normal(sizes, 0, 0.02)]
    base = Timed(params, lr=1e-5, fused=True)
    opt = EBUOptimizer(base, stats=not options.no_stats)
    given = normal(sizes, 1), normal(sizes, 2)
    target = torch.empty(n)
    source = torch.zeros(n)
    times: dict[str, list[float]] = {"wrapper": [], "adamw": [], "copy": []}
    others = Others()
    for _ in range(options.rounds + 3):
        grads = [[g.clone() for g in gs] for gs in given]
        start = time.perf_counter()
        for phase, gs in zip((opt.forget, opt.remember), grads, strict=True):
            with phase():
                put = time.perf_counter()
                for p, g in zip(params, gs, strict=True):
                    p.grad = g
                start += time.perf_counter() - put
        opt.step()
        opt.zero_grad()
        times["wrapper"].append(time.perf_counter() - start - base.seconds)
        times["adamw"].append(base.seconds)
        start = time.perf_counter()
        target.copy_(source)
        times["copy"].append(time.perf_counter() - start)
    found = {name: statistics.median(t[3:]) for name, t in times.items()}
    floor = found["copy"] * (FLOORS["online F"]) / 8
    return {
        **row,
        **found,
        "others": others.cores(),
        "over_adamw": found["wrapper"] / found["adamw"],
        "over_floor": (found["wrapper"] + found["adamw"]) / floor,
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ["scalars", "tensors", "threads", "wrapper", "AdamW", "wrapper / AdamW", "step / floor"]
    lines = []
    for r in rows:
        where = [f"{r['n']:,}", f"{r['tensors']:,}", str(r["threads"])]
        if "left_out" in r:
            lines.append([*where, f"left out: {r['left_out']}", "", "", ""])
            continue
        seconds = [report.seconds(r[name]) for name in ("wrapper", "adamw")]
        lines.append([*where, *seconds, f"{r['over_adamw']:.2f}", f"{r['over_floor']:.2f}"])
    return report.aligned(head, lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Both ratios by size, a line for each number of tensors, one panel a number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = sorted({r["threads"] for r in rows})
    figure, axes = plt.subplots(
        2, len(threads), figsize=(5.5 * len(threads), 7.5), sharex=True, sharey="row", squeeze=False
    )
    names = {"over_adamw": "wrapper / fused AdamW", "over_floor": "whole step / byte floor"}
    for (key, name), line, goal in zip(names.items(), axes, GOALS.values(), strict=True):
        for axis, team in zip(line, threads, strict=True):
            for count in TENSORS:
                mine = [r for r in rows if (r["tensors"], r["threads"]) == (count, team)]
                points = sorted((r["n"], r[key]) for r in mine if key in r)
                axis.loglog(*zip(*points), "o-", label=f"{count:,} tensors") if points else None
            axis.axhline(goal, color="black", ls="--", lw=1, label=f"goal, {goal}")
            axis.set_title(f"{name}, {team} thread{'s' * (team > 1)}")
            axis.grid(alpha=0.3, which="both")
            axis.set_xlabel("scalars")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--tensors", type=int, nargs="+", default=TENSORS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-stats", action="store_true", help="EBUOptimizer(stats=False)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        for size in args.sizes:
            for tensors in args.tensors:
                rows.append(apart(case, size, tensors, args, threads))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    document = {"machine": machine(), "rounds": args.rounds, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
