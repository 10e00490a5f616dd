"""The fused kernels on a GPU: exactness at every size, then times, bandwidths and memory.

    python tests/benchmarks/gpu.py --json gpu.json           # all of it
    python tests/benchmarks/gpu.py --only exact,select       # parts
    TRITON_INTERPRET=1 python tests/benchmarks/gpu.py --dry-run

Nothing is timed before `exact` has passed. Bandwidths are given next to those of a plain read (a
sum) and a plain copy, measured in the same process. Times are medians over CUDA events; rounds of
the rivals are interleaved. `loop` trains real networks with random weights (diffusers), so that the
share of a step that is ours is that of a real step. `distributed` has one rank by NCCL, `sanitizer`
goes through `exact` again under compute-sanitizer where that is installed, and `memory` runs
Stable Diffusion's unlearning with random weights. --dry-run does all of it at toy sizes on the
CPU, in Triton's interpreter: it shows that this file runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gpu_runs
import shapes
import torch
import ways
from torch import Tensor

from ebu_optim import EBUOptimizer
from ebu_optim.kernels import _launch_plan, _launch_selection, _tables, reference
from ebu_optim.kernels import triton as fused

PARTS = ("exact", "select", "bandwidth", "small", "loop", "distributed", "sanitizer", "memory")
RUNS = {name: getattr(gpu_runs, name) for name in PARTS if hasattr(gpu_runs, name)}


class Bench:
    """Where and how large; `dry` is the CPU with toy sizes, `little` a card with small ones."""

    def __init__(self, dry: bool, rounds: int, little: bool = False) -> None:
        self.dry, self.little = dry, little
        self.device = torch.device("cpu" if dry else "cuda")
        self.rounds = 1 if dry else rounds
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def memory(self) -> int:
        return 1 << 24 if self.dry else torch.cuda.mem_get_info()[0]

    def normal(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(n, generator=self.generator, device=self.device).to(dtype)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def timed(self, rivals: dict[str, Callable[[], Any]]) -> dict[str, float | str]:
        """Median seconds of each, interleaved; a rival that fails is given by its error."""
        times: dict[str, list[float]] = {name: [] for name in rivals}
        errors: dict[str, str] = {}
        for i in range(1 if self.dry else self.rounds + 1):
            for name, run in rivals.items():
                if name in errors:
                    continue
                try:
                    seconds = self._once(run)
                except (RuntimeError, NotImplementedError) as error:
                    errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    continue
                if i or self.dry:  # the first round warms up
                    times[name].append(seconds)
        return {n: errors.get(n) or statistics.median(t) for n, t in times.items()}

    def _once(self, run: Callable[[], Any]) -> float:
        if self.dry:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start_at, end_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start_at.record()
        run()
        end_at.record()
        end_at.synchronize()
        return start_at.elapsed_time(end_at) / 1e3


# -- parts ----------------------------------------------------------------------------------------


def split(x: Tensor, parts: int) -> list[Tensor]:
    """Views of unequal lengths, some of them unaligned."""
    n = x.numel()
    cuts = sorted({0, n, *(int(n * (i / parts) ** 1.5) for i in range(1, parts))})
    return [x[a:b] for a, b in pairwise(cuts)]


def count_check(x: Tensor, k: int, key: int) -> None:
    """Exactness without a second algorithm: fewer than k keys lie above, at least k not below."""
    above = at_least = 0
    for piece in x.split(1 << 26):
        u = reference.keys(piece, torch.float32).clamp_(max=0x7F800001)  # all NaN are tied
        above += int((u > key).sum())
        at_least += int((u >= key).sum())
    assert above < k <= at_least, (x.numel(), x.dtype, k, key, above, at_least)


def hard(bench: Bench, kind: str, n: int, dtype: torch.dtype) -> Tensor:
    x = bench.normal(n, dtype)
    if kind == "equal":
        x.fill_(0.5)
    if kind == "zeros":
        x[: n // 2 + n // 8] = 0
    if kind == "ties":
        x.mul_(4).round_()
    if kind == "wide":
        x.mul_(bench.normal(n).mul_(3).exp_().to(dtype))
    if kind == "nan":
        x[:: max(1, n // 1000)] = math.nan
        x[1 :: max(1, n // 1000)] = -math.inf
    return x


def exact(bench: Bench) -> list[dict[str, Any]]:
    """Keys at all sizes up to the memory, past 2**31 elements where they fit; the combination
    against the reference."""
    rows = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        fits = bench.memory // (6 * torch.finfo(dtype).bits // 8)
        sizes = [1, 1500] if bench.dry else [1, 1000, 10**5 + 3, 10**7 + 1, 10**8, 10**9]
        if bench.little:
            sizes = [1, 1000, 10**5 + 3]
        elif not bench.dry:
            sizes.append(2**31 + 12345)
        for n in (n for n in sizes if n <= fits):
            kinds = ("normal", "wide", "zeros", "ties", "equal", "nan")
            for kind in kinds[:: 5 if bench.dry else 1]:
                if n > 10**8 and kind not in ("normal", "equal"):
                    continue
                x = hard(bench, kind, n, dtype)
                parts = split(x, 1 if n < 100 else 3 if bench.dry else 97)
                for k in sorted({1, n // 2 or 1, n - n // 20})[-1 if bench.dry else 0 :]:
                    keys, bad = fused.select([(parts, k)], torch.float32)
                    again, _ = fused.select([(parts, k)], torch.float32)
                    assert keys.equal(again)
                    count_check(x, k, int(keys))
                    assert int(bad) == sum(int((~p.isfinite()).sum()) for p in x.split(1 << 26))
                rows.append({"n": n, "dtype": str(dtype), "kind": kind})
                del x, parts
        combination(bench, dtype)
    return rows


def columns(bench: Bench, n: int, dtype: torch.dtype) -> dict[str, Any]:
    x = {name: [bench.normal(n, dtype)] for name in ("params", "g_f", "g_r", "anchors")}
    return x | {"fishers": [bench.normal(n).square_()]}


def combination(bench: Bench, dtype: torch.dtype) -> None:
    n = 1101 if bench.dry else 10**5 + 3 if bench.little else 10**7 + 3
    scale = torch.tensor(0.25, device=bench.device)
    for update in ("added", "replaced", "routed"):
        x = columns(bench, n, dtype)
        keys, _ = fused.select([(x["g_f"], n // 2), (x["g_r"], n // 3)], torch.float32)
        results = []
        for module in (fused, fused, reference):
            copy = {name: [t.clone() for t in c] for name, c in x.items()}
            out = [torch.full_like(t, math.nan) for t in x["params"]]
            stats = ways.combine(
                module, copy, out, keys, update=update, online=0.25, inv_scale=scale
            )
            results.append((out[0], copy["fishers"][0], stats))
        for a, b in zip(results[0], results[1], strict=True):
            assert a.equal(b), "two runs differ"
        (out, fisher, stats), _, (want, new, sums) = results
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
        torch.testing.assert_close(out, want, **tolerance)
        torch.testing.assert_close(fisher, new, rtol=1e-6, atol=1e-9)
        assert stats[:4].equal(sums[:4])
        torch.testing.assert_close(stats, sums, rtol=1e-4, atol=1e-2)  # on a GPU torch's differ


def select(bench: Bench) -> list[dict[str, Any]]:
    """One gradient, k = N/2: seconds of every way to the threshold."""
    sizes = [2000] if bench.dry else [10**5, 10**6, 10**7, 10**8, 10**9]
    return [
        select_one(bench, n, dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for n in sizes
        if n * 40 < bench.memory
    ]


def select_one(bench: Bench, n: int, dtype: torch.dtype) -> dict[str, Any]:
    x, k = [bench.normal(n, dtype)], n // 2
    found = {"fused": functools.partial(ways.engine, fused), **ways.SELECTION}
    if not bench.dry:
        found["torch.compile of the bisection"] = torch.compile(ways.bisection)
    if n > 10**8:  # minutes
        del found["torch.kthvalue"], found["torch.topk"]
    want = float(ways.full_sort(x, k))
    rivals = {name: functools.partial(f, x, k) for name, f in found.items()}
    seconds = bench.timed(rivals)
    for name, run in rivals.items():
        if not isinstance(seconds[name], str):
            assert float(run()) == want, name
    return {"n": n, "dtype": str(dtype), "seconds": seconds}


def bandwidth(bench: Bench) -> list[dict[str, Any]]:
    """Bytes a second of each kernel, next to a plain read and a plain copy."""
    sizes = [2000] if bench.dry else [35_000_000, 10**8, 8 * 10**8]
    return [
        bandwidth_one(bench, n, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for n in sizes
        if n * (6 * torch.finfo(dtype).bits // 8 + 8) * 1.2 < bench.memory
    ]


def bandwidth_one(bench: Bench, n: int, dtype: torch.dtype) -> dict[str, Any]:
    size = torch.finfo(dtype).bits // 8
    x = columns(bench, n, dtype)
    keys, _ = fused.select([(x["g_f"], n // 2), (x["g_r"], n // 2)], torch.float32)
    plan, _ = _launch_plan.read_plan([(x["g_f"], n // 2)], bench.device)
    target = torch.empty_like(x["g_f"][0])
    factor = torch.ones((), device=bench.device)
    # G goes to g_r itself, which so drifts; the work does not depend on the values
    online = functools.partial(ways.combine, fused, online=0.01)
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "plain read": (size, lambda: x["g_f"][0].sum()),
        "plain copy": (2 * size, lambda: target.copy_(x["g_f"][0])),
        "select": (size, lambda: _launch_selection._select(plan)),
        "finite_probe": (size, lambda: fused.finite_probe(x["g_f"])),
        "combine": (5 * size + 4, lambda: ways.combine(fused, x, x["g_r"], keys)),
        "combine, online F": (5 * size + 8, functools.partial(online, x, x["g_r"], keys)),
        "scale": (2 * size, lambda: fused.scale(x["g_f"], factor)),
        "torch.compile of the formula": (5 * size + 4, compiled_formula(bench, x, target, keys)),
    }
    _, _, done = _launch_selection._select(plan)
    seconds = bench.timed({name: run for name, (_, run) in runs.items()})
    gigabytes = {
        name: s if isinstance(s, str) else runs[name][0] * n / s / 1e9
        for name, s in seconds.items()
    }
    return {
        "n": n,
        "dtype": str(dtype),
        "window settled": done.tolist(),
        "chunk": _tables.CHUNK,
        "seconds": seconds,
        "gigabytes a second": gigabytes,
        "fresh bytes a scalar": fresh(bench, runs, n),
    }


def fresh(bench: Bench, runs: dict[str, Any], n: int) -> dict[str, float]:
    """Peak of what a call allocates, by scalar."""
    found = {}
    for name in () if bench.dry else ("select", "combine"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runs[name][1]()
        found[name] = (torch.cuda.max_memory_allocated() - before) / n
    return found


def compiled_formula(
    bench: Bench, x: dict[str, Any], out: Tensor, keys: Tensor
) -> Callable[[], Any]:
    """The "added" update with the partial penalty, without sums, left to torch.compile."""
    run = ways.formula if bench.dry else torch.compile(ways.formula)
    names = ("params", "g_f", "g_r", "anchors", "fishers")
    return lambda: run(*(x[name][0] for name in names), keys, out)


def small(bench: Bench) -> dict[str, Any]:
    """1e5 scalars: what the host needs to launch it all, by the number of tensors; a CUDA graph."""
    n = 1000 if bench.dry else 10**5
    found: dict[str, Any] = {}
    for count in (1, 5) if bench.dry else (1, 100, 1000, 10_000):
        x = {c: list(bench.normal(n).split(max(1, n // count))) for c in ("params", "g_f", "g_r")}
        x["anchors"] = [t.clone() for t in x["params"]]
        x["fishers"] = [t.square() for t in x["params"]]

        def run(x: dict[str, Any] = x) -> None:
            keys, _ = fused.select([(x["g_f"], n // 2), (x["g_r"], n // 2)], torch.float32)
            ways.combine(fused, x, x["g_r"], keys)

        bench.timed({"warm up": run})
        start = time.perf_counter()
        for _ in range(bench.rounds):
            run()
        host = (time.perf_counter() - start) / bench.rounds
        found[str(count)] = {"host seconds": host, **bench.timed({"seconds": run})}
        if not bench.dry:
            found[str(count)] |= {"graph seconds": captured(bench, run)}
    return found


def captured(bench: Bench, run: Callable[[], None]) -> float:
    """One step replayed as a CUDA graph: capture fails at any wait of the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    seconds = bench.timed({"graph": graph.replay})["graph"]
    assert isinstance(seconds, float), seconds
    return seconds


def networks(dry: bool) -> dict[str, tuple[Any, int, tuple[int, ...], Any]]:
    """name: (build, batch, shape of a sample, shape of the text or None), by diffusers' configs."""
    from diffusers import UNet2DModel

    if dry:
        build = lambda: UNet2DModel(  # noqa: E731
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )
        return {"toy": (build, 2, (3, 8, 8), None)}
    return {
        "DDPM, batch 32": (shapes.ddpm, 32, (3, 32, 32), None),
        "SD 1.x, batch 1": (shapes.stable_diffusion, 1, (4, 64, 64), (77, 768)),
    }


def loop(bench: Bench) -> list[dict[str, Any]]:
    """A real step: two losses, two backward passes, EBU, AdamW; against what cannot be avoided."""
    try:
        zoo = networks(bench.dry)
    except ImportError as error:
        return [{"skipped": f"diffusers is not installed: {error}"}]
    rows = []
    for name, (build, batch, shape, text) in zoo.items():
        dtypes = [torch.float32] if bench.dry else [torch.float16, torch.bfloat16]
        for dtype in dtypes:
            if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
                continue
            for choice in (True, False):
                model = build().to(bench.device, dtype)
                row = {"model": name, "dtype": str(dtype), "fused": choice}
                rows.append(row | training(bench, model, batch, shape, text, choice))
                del model
                if not bench.dry:
                    torch.cuda.empty_cache()
    return rows


def training(
    bench: Bench, model: Any, batch: int, shape: tuple[int, ...], text: Any, choice: bool
) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    base = torch.optim.AdamW(model.parameters(), lr=0.0, fused=not bench.dry)
    if bench.dry and choice:
        choice = None  # type: ignore[assignment]  # no fused kernels for a CPU to insist on
    # float16 without a loss scale may overflow: a skipped step would be a fast one
    opt = EBUOptimizer(base, gamma=1.0, nonfinite="propagate", fused=choice)
    x = [bench.normal(batch * math.prod(shape), dtype).view(batch, *shape) for _ in range(2)]
    t = torch.randint(0, 1000, (batch,), device=bench.device)
    arguments = (t,)
    if text is not None:
        words = bench.normal(batch * math.prod(text), dtype).view(batch, *text)
        arguments = (t, words)

    def backward(which: int) -> None:
        loss = model(x[which], *arguments).sample.float().square().mean()
        (1e-3 * loss).backward()

    def passes() -> None:
        backward(0)
        backward(1)

    def both() -> None:
        opt.step(forget=lambda: backward(0), remember=lambda: backward(1))
        opt.zero_grad()

    both()  # theta0, F and the state of AdamW
    passes()
    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.timed({"backward passes": passes, "AdamW": base.step})
    base.zero_grad()
    whole = bench.timed({"whole step": both})
    peak = 0 if bench.dry else torch.cuda.max_memory_allocated()
    figures: dict[str, Any] = {**seconds, **whole, "peak bytes": peak}
    figures["scalars"] = sum(p.numel() for p in model.parameters())
    figures["counted bytes"] = counted(model, opt, lambda: model(x[0], *arguments))
    parts = [figures[n] for n in ("whole step", "backward passes", "AdamW")]
    if all(isinstance(p, float) for p in parts):
        figures["share that is ours"] = 1 - (parts[1] + parts[2]) / parts[0]
    return figures


def counted(model: Any, opt: EBUOptimizer, run: Callable[[], Any]) -> int:
    """Weights, two gradients, all that the optimizer keeps, and what a pass saves for its backward
    pass: to stand beside "peak bytes"."""
    from ebu_optim.text_to_image.families import STABLE_DIFFUSION
    from ebu_optim.text_to_image.memory import saved

    with saved(model, STABLE_DIFFUSION.units) as (units, _):
        run()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    state = (t for row in opt.state_dict()["state"].values() for t in row.values())
    kept = size(t for t in state if isinstance(t, Tensor))
    return 3 * size(model.parameters()) + kept + sum(units.values())


def machine(dry: bool) -> dict[str, Any]:
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__}
    if dry:
        return found | {"card": "none: dry run in the interpreter"}
    p = torch.cuda.get_device_properties(0)
    return found | {
        "card": p.name,
        "capability": f"{p.major}.{p.minor}",
        "memory": p.total_memory,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by comma: %(default)s")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=_tables.CHUNK, help="elements a program")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true", help="small sizes, for a sanitizer")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry-run needs TRITON_INTERPRET=1 in the environment")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; TRITON_INTERPRET=1 and --dry-run try this file without one")
    least = _launch_selection.RADIX_TILE
    most = 1 << 21  # more would overflow the 16-bit counts of `combine_kernel`
    if not least <= args.chunk <= most or args.chunk & (args.chunk - 1):
        parser.error(f"--chunk: a power of 2 from {least} to {most}, not {args.chunk}")
    if reason := fused.available():
        parser.error(reason)
    _tables.CHUNK = least if args.dry_run else args.chunk
    bench = Bench(args.dry_run, args.rounds, args.small)
    result: dict[str, Any] = {"machine": machine(args.dry_run), "rounds": bench.rounds}
    if "exact" not in wanted:
        result["exact"] = "not checked in this run"
    for part in PARTS:
        if part in wanted:
            result[part] = (RUNS.get(part) or globals()[part])(bench)
            print(part, json.dumps(result[part], indent=1), flush=True)
            if args.json:  # after every part: a crash later loses nothing
                args.json.write_text(json.dumps(result, indent=1))
    runs = [row for part in RUNS for row in result.get(part, [])]
    failed = [row for row in runs if row.get("code")]
    sys.exit(f"{len(failed)} of {len(runs)} runs failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
