"""The whole step without the backward passes, against the naive torch chain.

    python tests/benchmarks/bench_step.py --n 35000000 --tensors 1000

Both sides do the same work on the same gradients: two exact selections over all tensors together,
the "added" combination with the Fisher penalty, and AdamW. The naive chain is what one writes
first: cat of abs, kthvalue twice, torch.where. Rounds are interleaved in one process; the figures
are medians. The peak of fresh memory is measured in a process of its own for each side.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from ebu_optim import EBUOptimizer

ALPHA, DELTA, GAMMA = 0.6, 0.5, 1.0


def gradients(params: list[Tensor], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g) for p in params]


def parameters(n: int, tensors: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = [n // tensors] * (tensors - 1)
    sizes.append(n - sum(sizes))
    return [torch.nn.Parameter(torch.randn(s, generator=g) * 0.02) for s in sizes]


def naive_step(params, g_f, g_r, anchors, fishers, base) -> None:
    n = sum(p.numel() for p in params)
    k = max(1, math.floor(DELTA * n + 0.5))
    taus = []
    for grads in (g_f, g_r):
        flat = torch.cat([g.abs().flatten() for g in grads])
        taus.append(flat.kthvalue(n - k + 1).values)
    scale = GAMMA / math.sqrt(sum(float(f.sum()) for f in fishers) / n)
    for p, f, r, a, fisher in zip(params, g_f, g_r, anchors, fishers, strict=True):
        m_f, m_r = (f.abs() >= taus[0]) & (f != 0), (r.abs() >= taus[1]) & (r != 0)
        both = m_f & m_r
        penalty = torch.where(m_r & ~m_f, scale * fisher * (p.detach() - a), 0.0)
        blend = torch.where(both, ALPHA * f + (1 - ALPHA) * r, torch.where(m_f, f, 0.0))
        p.grad = f + (r + penalty) + blend
    base.step()


class Naive:
    def __init__(self, n: int, tensors: int) -> None:
        self.params = parameters(n, tensors)
        self.anchors = [p.detach().clone() for p in self.params]
        self.fishers = [g.square() for g in gradients(self.params, 3)]
        self.base = torch.optim.AdamW(self.params, lr=1e-5, fused=True)

    def step(self, g_f, g_r) -> None:
        with torch.no_grad():
            naive_step(self.params, g_f, g_r, self.anchors, self.fishers, self.base)


class Ours:
    def __init__(self, n: int, tensors: int) -> None:
        self.params = parameters(n, tensors)
        fishers = gradients(self.params, 3)
        mapping = {p: f.square_() for p, f in zip(self.params, fishers, strict=True)}
        self.opt = EBUOptimizer(
            torch.optim.AdamW(self.params, lr=1e-5, fused=True),
            alpha=ALPHA, delta=DELTA, gamma=GAMMA, fisher=mapping, nonfinite="propagate",
        )  # fmt: skip

    def step(self, g_f, g_r) -> None:
        with self.opt.forget():
            for p, g in zip(self.params, g_f, strict=True):
                p.grad = g
        with self.opt.remember():
            for p, g in zip(self.params, g_r, strict=True):
                p.grad = g
        self.opt.step()


SIDES = {"naive": Naive, "ours": Ours}


def timed(side, g_f, g_r) -> float:
    a, b = [g.clone() for g in g_f], [g.clone() for g in g_r]
    start = time.perf_counter()
    side.step(a, b)
    return time.perf_counter() - start


def peak(name: str, n: int, tensors: int, threads: int, queue) -> None:
    """Fresh memory of the second step over what is held before it, in bytes."""
    torch.set_num_threads(threads)
    side = SIDES[name](n, tensors)
    g_f, g_r = gradients(side.params, 1), gradients(side.params, 2)
    side.step(g_f, g_r)
    a, b = gradients(side.params, 1), gradients(side.params, 2)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # reset the peak of the resident size
    before = _status("VmRSS")
    side.step(a, b)
    queue.put(max(0, _status("VmHWM") - before))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=float, default=3.5e7, help="scalars")
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n = int(args.n)
    sides = {name: build(n, args.tensors) for name, build in SIDES.items()}
    g_f = gradients(sides["ours"].params, 1)
    g_r = gradients(sides["ours"].params, 2)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, side in sides.items():
            seconds = timed(side, g_f, g_r)
            if i:  # the first round warms up
                times[name].append(seconds)
    # the same work, the same weights; but Adam makes much of the rounding of a G next to zero
    pairs = zip(sides["naive"].params, sides["ours"].params, strict=True)
    differ = sum(int((~p.isclose(q, rtol=1e-4, atol=1e-6)).sum()) for p, q in pairs)
    assert differ <= 1 + 1e-6 * n, differ
    del sides, g_f, g_r
    context = multiprocessing.get_context("spawn")
    fresh = {}
    for name in SIDES:
        queue = context.Queue()
        process = context.Process(target=peak, args=(name, n, args.tensors, args.threads, queue))
        process.start()
        fresh[name] = queue.get()
        process.join()
    medians = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "n": n, "tensors": args.tensors, "rounds": args.rounds, "threads": args.threads,
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "seconds": medians, "ratio": medians["naive"] / medians["ours"],
        "fresh_bytes_per_scalar": {name: b / n for name, b in fresh.items()},
        "fresh_mebibytes": {name: b / 2**20 for name, b in fresh.items()},
    }  # fmt: skip
    print(f"{'':8}{'step, s':>10}{'fresh MiB':>12}{'bytes/scalar':>14}")
    for name in SIDES:
        print(f"{name:8}{medians[name]:>10.3f}{fresh[name] / 2**20:>12.1f}{fresh[name] / n:>14.2f}")
    print(f"ours is {result['ratio']:.1f} times faster")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
