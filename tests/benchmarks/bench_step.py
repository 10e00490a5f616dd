"""The CPU kernels against other ways to do their work, and against the memory's speed.

    python tests/benchmarks/bench_step.py --json bench_step.json
    python tests/benchmarks/bench_step.py --sections select --cases 1e8 --threads 1
    python tests/benchmarks/bench_step.py --json bench_step.json --plot benchmarks.png --show

Sections: `select`, the threshold of one gradient, k = n/2, the limit being one plain read;
`combine`, one pass over the five columns, the limit being the speed of a plain copy; `step`, two
selections, the combination and fused AdamW against the naive chain and the byte floor, and two
baselines' steps, which make no selection; `linear`,
the cost per scalar by size and by number of tensors.

Rounds are interleaved; the figures are medians; a call of more than a second is made once. Every
case and number of threads has a process of its own, and so has the memory of a step. What would
take more than --longest seconds, by the next smaller case of the file, or more memory than is
free, is left out. --json keeps the file's other rows; --show prints the file and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import shapes
import torch
import ways
from measure import Others, available, fresh, machine, measure
from torch import Tensor

from ebu_optim import EBUOptimizer
from ebu_optim.baselines import Joint, SelectiveAmnesia
from ebu_optim.kernels import backend, chunked, cpu, reference
from ebu_optim.kernels._cpu_tables import List
from ebu_optim.optim import PhasedOptimizer

Row = dict[str, Any]
GIB = 1 << 30
LEAVE = 3 * GIB  # for the system and others


def normal(sizes: Sequence[torch.Size], seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).mul_(scale) for s in sizes]


class Case:
    """One case with one number of threads: its rows, and what earlier rows say of its cost."""

    def __init__(self, section: str, name: str, options: argparse.Namespace, seen: list[Row]):
        self.section, self.name, self.options = section, name, options
        self.sizes = [] if section == "linear" else shapes.case_shapes(name)
        self.n = sum(map(math.prod, self.sizes))
        same = [r for r in seen if r["section"] == section and r["threads"] == options.threads]
        self.seen = {r["way"]: r for r in sorted(same, key=lambda r: r["n"]) if r["n"] < self.n}
        self.rows: list[Row] = []
        self.clock = time.process_time if options.cpu_time else time.perf_counter

    def add(self, way: str, **figures: Any) -> None:
        self.rows.append(
            {
                "section": self.section,
                "case": self.name,
                "n": self.n,
                "tensors": len(self.sizes),
                "threads": self.options.threads,
                "way": way,
                **figures,
            }
        )

    def too_much(self, way: str) -> str | None:
        """Why a way is left out, by its figures for the largest of the smaller sizes."""
        before = self.seen.get(way, {})
        seconds, taken = before.get("seconds"), before.get("fresh_bytes")
        if before.get("left_out", "").startswith("more than") or (
            seconds is not None and seconds * self.n / before["n"] > self.options.longest
        ):
            return f"more than {self.options.longest:g} s"
        return self.memory(taken * self.n / before["n"]) if taken else None

    def memory(self, needed: float) -> str | None:
        free = available()
        if needed + LEAVE < free:
            return None
        return f"needs {needed / GIB:.1f} GiB, {max(0, free - LEAVE) / GIB:.1f} GiB were free"

    def run(
        self,
        found: dict[str, Callable[[], Any]],
        limit: str,
        share: Callable[[str], float],
        moved: dict[str, float],
        **more: Any,
    ) -> None:
        """Measure; a way's limit is `share` of the time of the way called `limit`."""
        reasons = {way: self.too_much(way) for way in found}
        take = {way: run for way, run in found.items() if not reasons[way]}
        result = measure(take, self.options.rounds, self.clock, **more)
        others = [r["seconds"] for way, r in result.items() if way != limit and not ours(way)]
        for way, reason in reasons.items():
            if reason:
                self.add(way, left_out=reason)
                continue
            seconds = result[way]["seconds"]
            self.add(
                way,
                **result[way],
                over_limit=seconds / share(way) / result[limit]["seconds"],
                over_best_rival=seconds / min(others) if others and way != limit else None,
                bytes_per_scalar=moved.get(way),
            )


def ours(way: str) -> bool:
    return way.startswith(("ours", "reference"))


# -- sections -------------------------------------------------------------------------------------


# Bytes to and from memory for each scalar: once, a sample, and 1 % kept and read; a bisection reads
# 31 times, in eager mode by way of a bool tensor. How often a sort or partition does is unknown.
READ = {
    "plain read": 4.0,
    "ours": 4.2,
    "ours, fallback alone": 8.0,
    "reference": 4.2,
    "bit bisection": 8.0 + 31 * 6,
    "torch.compile, bisection": 31 * 4.0,
}


def select(case: Case) -> None:
    if reason := case.memory(4 * case.n):
        return case.add("ours", left_out=reason)
    grads, k = normal(case.sizes, 0), ways.rank(case.n)
    engine = backend(grads, None)
    found: dict[str, Callable[[], Any]] = {
        "plain read": lambda: sum(g.sum() for g in grads),
        "ours": lambda: ways.engine(engine, grads, k),
    }
    if engine is cpu:
        listed = List(grads)
        found["ours, fallback alone"] = lambda: cpu._cpu.radix(
            *listed.arguments(), k, case.options.threads
        )
    found["reference"] = lambda: ways.engine(chunked, grads, k)
    rivals = {**ways.SELECTION, "np.partition": ways.partition}
    found |= {way: functools.partial(f, grads, k) for way, f in rivals.items()}
    if len(grads) == 1:  # graphs of hundreds of tensors take minutes to compile
        compiled = torch.compile(ways.bisection)
        found["torch.compile, bisection"] = lambda: compiled(grads, k)
    want = ways.engine(reference, grads, k)

    def check(way: str, result: Any) -> None:
        if way == "ours, fallback alone":
            result = reference.key_to_value(torch.tensor(int(result)), torch.float32)
        assert way == "plain read" or float(result) == float(want), (way, result, want)

    case.run(found, "plain read", lambda way: 1.0, READ, check=check)


# for each operation what it reads and writes, bools being one byte
MOVED = {
    "plain copy": 8.0,
    "ours": 24.0,
    "ours, online F": 28.0,
    "reference": 24.0,
    "torch.compile, formula": 24.0,
    "chain of where": 177.0,
    "PCGrad, plain torch": 44.0,
    "PCGrad, TorchJD": 20.0,
}
LIMIT = {"ours, online F": 28.0 / 8}  # of the others: 24 / 8


def combine(case: Case) -> None:
    roomy = case.memory(28 * case.n) is None
    if reason := case.memory(20 * case.n):
        return case.add("ours", left_out=reason)
    x: dict[str, Any] = {
        name: normal(case.sizes, seed)
        for seed, name in enumerate(("params", "g_f", "g_r", "anchors", "fishers"))
    }
    for fisher in x["fishers"]:
        fisher.square_()
    target = [torch.zeros(s) for s in case.sizes] if roomy else x["g_r"]
    keys, _ = backend(x["g_f"], None).select(
        [(x[name], ways.rank(case.n)) for name in ("g_f", "g_r")], torch.float32
    )
    taus = [reference.key_to_value(key, torch.float32) for key in keys]
    columns = [x[name] for name in ("params", "g_f", "g_r", "anchors", "fishers")]

    def copy() -> None:
        for to, values in zip(target, x["params"], strict=True):
            to.copy_(values)

    # in place of g_r, as in a step; it drifts from round to round, and the work does not depend
    # on the values
    def engine(module: Any, online: float | None = None) -> None:
        ways.combine(module, x, x["g_r"], keys, online=online)

    module = backend(x["g_f"], None)
    found: dict[str, Callable[[], Any]] = {
        "plain copy": copy,
        "ours": lambda: engine(module),
        "ours, online F": lambda: engine(module, 1e-9),
        "reference": lambda: engine(chunked),
        "chain of where": lambda: [ways.chain(*row, *taus) for row in zip(*columns, strict=True)],
        "PCGrad, plain torch": lambda: ways.pcgrad(x["g_f"], x["g_r"]),
    }
    if len(case.sizes) == 1:
        compiled = torch.compile(ways.formula)
        row = [column[0] for column in columns]
        found["torch.compile, formula"] = lambda: compiled(*row, keys, x["g_r"][0])
        pcgrad = ways.torchjd_pcgrad()
        if isinstance(pcgrad, str):
            case.add("PCGrad, TorchJD", left_out=pcgrad)
        elif not (reason := case.memory(16 * case.n)):
            matrix = torch.stack([x["g_f"][0], x["g_r"][0]])  # as TorchJD's backward leaves it
            found["PCGrad, TorchJD"] = lambda: pcgrad(matrix)
        else:
            case.add("PCGrad, TorchJD", left_out=reason)

    def share(way: str) -> float:
        return 1.0 if way == "plain copy" else LIMIT.get(way, 24.0 / 8)

    case.run(found, "plain copy", share, MOVED)


# two selections, the combination, AdamW
FLOORS = {"given F": 8.4 + 24 + 28}
FLOORS["online F"] = FLOORS["given F"] + 4
FLOORS["online F, clipped"] = FLOORS["online F"] + 8
# a look for Inf instead of selections; the plain sum reads neither theta, theta0 nor F
FLOORS["plain sum"], FLOORS["Selective Amnesia"] = 8 + 12 + 28, 8 + 24 + 28


class Naive:
    def __init__(self, sizes: Sequence[torch.Size]) -> None:
        self.params = [torch.nn.Parameter(t) for t in normal(sizes, 0, 0.02)]
        self.anchors = [p.detach().clone() for p in self.params]
        self.fishers = [g.square_() for g in normal(sizes, 3)]
        self.base = torch.optim.AdamW(self.params, lr=1e-5, fused=True)

    def step(self, g_f: list[Tensor], g_r: list[Tensor]) -> None:
        with torch.no_grad():
            ways.naive_step(self.params, g_f, g_r, self.anchors, self.fishers, self.base)


class Ours:
    def __init__(self, sizes: Sequence[torch.Size], configuration: str = "given F") -> None:
        self.params = [torch.nn.Parameter(t) for t in normal(sizes, 0, 0.02)]
        base = torch.optim.AdamW(self.params, lr=1e-5, fused=True)
        fisher: Any = "online"
        if configuration in ("given F", "Selective Amnesia"):
            fisher = {p: f.square_() for p, f in zip(self.params, normal(sizes, 3), strict=True)}
        self.opt: PhasedOptimizer
        if configuration == "plain sum":
            self.opt = Joint(base)
        elif configuration == "Selective Amnesia":
            self.opt = SelectiveAmnesia(base, fisher=fisher, lam=ways.GAMMA)
        else:
            self.opt = EBUOptimizer(
                base,
                alpha=ways.ALPHA,
                delta=ways.DELTA,
                gamma=ways.GAMMA,
                fisher=fisher,
                max_grad_norm=1.0 if configuration.endswith("clipped") else None,
            )

    def step(self, g_f: list[Tensor], g_r: list[Tensor]) -> None:
        for phase, grads in ((self.opt.forget, g_f), (self.opt.remember, g_r)):
            with phase():
                for p, g in zip(self.params, grads, strict=True):
                    p.grad = g
        self.opt.step()


SIDES: dict[str, Callable[[Sequence[torch.Size]], Any]] = {
    "naive": Naive,
    **{f"ours, {name}": functools.partial(Ours, configuration=name) for name in FLOORS},
}


def step(case: Case) -> None:
    """Whole steps on one set of gradients. Naive and ours, with one F, end with one set of
    weights: the same work."""
    # theta, theta0, F and two moments on a side, and the gradients twice
    if reason := case.memory((6 * 20 + 16 + 12) * case.n if case.n < 5e7 else 60 * case.n):
        return case.add("ours, given F", left_out=reason)
    names = [name for name in SIDES if case.n < 5e7 or name in ("naive", "ours, given F")]
    sides = {name: SIDES[name](case.sizes) for name in names}
    g_f, g_r = normal(case.sizes, 1), normal(case.sizes, 2)
    target = [torch.zeros_like(g) for g in g_f]
    times: dict[str, list[float]] = {name: [] for name in ("plain copy", *names)}
    others = Others()
    for i in range(case.options.rounds + 1):
        slow = {name for name, t in times.items() if t and t[0] > 0.5}
        for name in times:
            if name in slow and i > 3:
                continue
            a, b = [g.clone() for g in g_f], [g.clone() for g in g_r]
            start = case.clock()
            if name == "plain copy":
                for to, values in zip(target, g_f, strict=True):
                    to.copy_(values)
            else:
                sides[name].step(a, b)
            if i:  # the first round warms up
                times[name].append(case.clock() - start)
            if i == min(2, case.options.rounds) and name == "ours, given F":
                # Adam makes much of the rounding of a G next to zero
                pairs = zip(sides["naive"].params, sides[name].params, strict=True)
                differ = sum(int((~p.isclose(q, rtol=1e-4, atol=1e-6)).sum()) for p, q in pairs)
                assert differ <= 1 + 1e-6 * case.n, differ
    load = others.cores()
    del sides, g_f, g_r, a, b
    median = {name: statistics.median(t) for name, t in times.items()}
    case.add("plain copy", seconds=median["plain copy"], bytes_per_scalar=8.0)
    for name in names:
        floor = FLOORS.get(name.removeprefix("ours, "), FLOORS["given F"])
        limit = median["plain copy"] * floor / 8
        case.add(
            name,
            seconds=median[name],
            calls=len(times[name]),
            others=load,
            over_limit=median[name] / limit,
            over_best_rival=median[name] / median["naive"],
            bytes_per_scalar=floor if ours(name) else None,
            fresh_bytes=apart(peak, name, case.sizes, case.options.threads),
        )


def peak(name: str, sizes: Sequence[torch.Size], threads: int) -> int | None:
    """Fresh memory of the second step over what is held before it, in bytes."""
    torch.set_num_threads(threads)
    side = SIDES[name](sizes)
    side.step(normal(sizes, 1), normal(sizes, 2))
    a, b = normal(sizes, 1), normal(sizes, 2)
    return fresh(lambda: side.step(a, b))[1]


def linear(case: Case) -> None:
    """Seconds by size in one tensor, and by the number of tensors."""
    sizes = [(10**6, 1), (10**7, 1), (10**8, 1)]
    if case.name == "tensors":
        sizes = [(10**7, count) for count in (1, 100, 1000, 10_000)]
    for n, count in sizes:
        case.sizes, case.n = shapes.parts(n, count), n
        if reason := case.memory(20 * n):
            case.add("select", left_out=reason)
            continue
        x: dict[str, Any] = {
            name: normal(case.sizes, seed)
            for seed, name in enumerate(("params", "g_f", "g_r", "anchors", "fishers"))
        }
        module = backend(x["g_f"], None)
        pool = [(x["g_f"], ways.rank(n))]
        keys, _ = module.select([*pool, *pool], torch.float32)
        found = measure(
            {
                "select": lambda m=module, p=pool: m.select(p, torch.float32),
                "combine": lambda m=module, x=x, k=keys: ways.combine(m, x, x["g_r"], k),
            },
            case.options.rounds,
            case.clock,
        )
        for way, figures in found.items():
            case.add(way, **figures, nanoseconds_per_scalar=figures["seconds"] / n * 1e9)


# -- the whole ------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Case], None]] = {
    "select": select,
    "combine": combine,
    "step": step,
    "linear": linear,
}


def one(section: str, name: str, options: argparse.Namespace, seen: list[Row]) -> list[Row]:
    torch.set_num_threads(options.threads)
    if options.lanes:
        cpu._cpu.lanes(options.lanes)
    case = Case(section, name, options, seen)
    SECTIONS[section](case)
    return case.rows


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """The result of `work` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours_end, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        return ours_end.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__}{args[:2]} ended with {process.exitcode}") from None
    finally:
        process.join()


def _send(pipe: Any, work: Callable[..., Any], args: Sequence[Any]) -> None:
    pipe.send(work(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--cases", nargs="+", default=list(shapes.CASES), help="%(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads(), 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--longest", type=float, default=20, help="seconds of one call")
    parser.add_argument("--lanes", choices=["avx512", "avx2", "base"], help="default: the best")
    parser.add_argument("--cpu-time", action="store_true", help="the process's seconds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    document: Row = {"machine": machine(), "rounds": args.rounds, "rows": []}
    if args.json and args.json.exists():
        document["rows"] = json.loads(args.json.read_text())["rows"]
    for threads in dict.fromkeys(() if args.show else args.threads):
        options = argparse.Namespace(**{**vars(args), "threads": threads})
        for section in args.sections:
            for name in ("size", "tensors") if section == "linear" else args.cases:
                rows = apart(one, section, name, options, document["rows"])
                key = (section, name, threads)
                document["rows"] = rows + [
                    r for r in document["rows"] if (r["section"], r["case"], r["threads"]) != key
                ]
                print(report.table(rows), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.show:
        print(report.everything(document["rows"]))
    if args.plot:
        report.plot(document["rows"], args.plot)


if __name__ == "__main__":
    main()
