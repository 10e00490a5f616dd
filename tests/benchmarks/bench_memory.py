"""What theta0 and F cost in memory, and what holding them in 16 bits costs in results.

    python tests/benchmarks/bench_memory.py --n 30000000

Bytes for each scalar, beside the plain loop that steps on the sum of the two losses: held between
the steps (counted from the tensors) and at the peak of the third step, backward passes included
(the rise of the resident size over the weights alone, each case in a process of its own). Then the
quickstart's run with theta0 and F held in each way: how far the weights end from those of the exact
run, relative to how far they moved, and the quickstart's own figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebu_optim import EBUOptimizer

SIXTEEN = {"anchor_dtype": torch.float16, "fisher_dtype": torch.bfloat16}
CASES: dict[str, dict[str, Any] | None] = {
    "plain loop": None,
    "no penalty": {"fisher": None},
    "default": {},
    "freeze": {"unrelated": "freeze"},
    "16 bits": SIXTEEN,
    "16 bits, freeze": {**SIXTEEN, "unrelated": "freeze"},
}
BASES = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-4, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-4, fused=True),
}
CONTROL = "exact, one weight off by its last bit"  # how far rounding alone carries a run
HELD = {
    "exact": {},
    CONTROL: {},
    "theta0 float16": {"anchor_dtype": torch.float16},
    "theta0 bfloat16": {"anchor_dtype": torch.bfloat16},
    "F bfloat16": {"fisher_dtype": torch.bfloat16},
    "float16 and bfloat16": SIXTEEN,
    "both bfloat16": {"anchor_dtype": torch.bfloat16, "fisher_dtype": torch.bfloat16},
}


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def backward(params: list[Tensor], target: float) -> None:
    for p in params:
        (p - target).square().sum().backward()


def measure(case: str, base: str, n: int, tensors: int, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train(case, base, [torch.nn.Parameter(torch.randn(9))])  # what is loaded at the first use
    params = [torch.nn.Parameter(torch.randn(n // tensors)) for _ in range(tensors)]
    before = resident("VmRSS")
    held, peak = train(case, base, params)
    queue.put((4 + held / n, 4 + (peak - before) / n))


def train(case: str, base: str, params: list[Tensor]) -> tuple[int, int]:
    """Bytes that are held beyond the weights, and the peak of the resident size."""
    plain = BASES[base](params)
    options = CASES[case]
    opt = plain if options is None else EBUOptimizer(plain, **options)
    for i in range(3):
        if i == 2:
            Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident size
        if isinstance(opt, EBUOptimizer):
            with opt.forget():
                backward(params, 1.0)
            with opt.remember():
                backward(params, -1.0)
        else:
            backward(params, 1.0)
            backward(params, -1.0)
        opt.step()
        peak = resident("VmHWM")
        opt.zero_grad()
    held = [t for s in plain.state.values() for t in s.values() if isinstance(t, Tensor)]
    if isinstance(opt, EBUOptimizer):
        held += [*opt.anchors().values(), *opt._anchors.fisher.values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values()), peak


def errors(seed: int) -> dict[str, dict[str, float]]:
    """The quickstart's unlearning with theta0 and F held in each way."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import digits
    import quickstart

    found: dict[str, dict[str, float]] = {}
    exact: list[Tensor] = []
    for name, options in HELD.items():
        quickstart.EBUOptimizer = functools.partial(EBUOptimizer, **options)
        args = quickstart.parse(["--seed", str(seed), "--output_dir", os.devnull + "-none"])
        torch.manual_seed(seed)
        evaluation = quickstart.Evaluation(args.forget, "cpu")
        model = digits.load_unet("cpu")
        with torch.no_grad():  # the shipped weights are float16: give them float32's digits
            for i, p in enumerate(model.parameters()):
                g = torch.Generator().manual_seed(i)
                p.mul_(1 + 1e-3 * torch.rand(p.shape, generator=g))
            if name == CONTROL:
                first = next(model.parameters()).view(-1)[:1]
                first.copy_(first.nextafter(torch.tensor(torch.inf)))
        start = [p.detach().clone() for p in model.parameters()]
        with tempfile.TemporaryDirectory() as work:
            quickstart.unlearn(model, args, evaluation, Path(work))
        labels = torch.tensor(digits.CLASSES).repeat_interleave(quickstart.PER_CLASS)
        images = evaluation.draw(model, labels, seed=1)
        after = evaluation.measure(images, labels)
        weights = [p.detach().clone() for p in model.parameters()]
        exact = exact or weights
        off, moved = (
            sum((a - b).square().sum().double() for a, b in zip(weights, other)) ** 0.5
            for other in (exact, start)
        )
        found[name] = {k: after[k] for k in ("p_f_reject", "ra_reject")}
        found[name]["off"] = float(off / moved)
        shown = f"{found[name]['off']:>10.4f}{after['p_f_reject']:>18.4f}{after['ra_reject']:>8.3f}"
        print(f"{seed:>5} {name:40}{shown}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=float, default=3e7, help="scalars")
    parser.add_argument("--tensors", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="none: no errors")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    n = int(args.n) // args.tensors * args.tensors
    # every block of memory goes back to the system when it is freed
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    table: dict[str, dict[str, dict[str, float]]] = {}
    print(f"bytes a scalar, weights included{'held':>12}{'peak':>8}")
    for base in BASES:
        for case in CASES:
            queue = context.Queue()
            process = context.Process(target=measure, args=(case, base, n, args.tensors, queue))
            process.start()
            held, peak = queue.get()
            process.join()
            table.setdefault(base, {})[case] = {"held": held, "peak": peak}
            print(f"{base:8}{case:24}{held:>12.2f}{peak:>8.2f}")
    if args.seeds:
        print(f"\n{'seed':>5} {'held as':40}{'off':>10}{'P_f, reject class':>18}{'kept':>8}")
    result = {
        "n": n,
        "tensors": args.tensors,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "bytes_per_scalar": table,
        "quickstart": {seed: errors(seed) for seed in args.seeds},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
