"""Stable Diffusion 1.x at its real size through `ebu forget` on the CPU: from one file to one file.

    python tests/benchmarks/full_size.py --json docs/evidence/full_size.json

The file is made here: random weights of the shipped configurations, float16, with some tensors of a
`model_ema`, as people have it. Each case does what the command does, in a process of its own, with
few images and sampling steps. Measured are the peak of the resident size by phase, beside the count
that the command says beforehand; seconds, and the wrapper's share of a step; and the file that
comes back is compared with the one that went in, byte for byte.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from bench_step import apart
from full_size_file import compare, make
from measure import Others, available, machine, resident

GIB = 2**30
SPARE = 4 * GIB  # is left to the rest of the machine
DISK = 16e9  # the file, both unpacked, the result, a checkpoint of cross attention
CASES: dict[str, dict[str, Any]] = {
    "cross attention": {"train_modules": "xattn"},
    "cross attention, bf16": {"train_modules": "xattn", "mixed_precision": "bf16"},
    "whole UNet": {"train_modules": "full"},
    "whole UNet, bf16": {"train_modules": "full", "mixed_precision": "bf16"},
}
FEW: dict[str, Any] = {
    "replay_images": 1,
    "forget_images": 1,
    "num_inference_steps": 2,
    "sample_batch_size": 1,
    "validation_steps": 0,
    "evidence_images": 1,
    "evidence_prompts": 1,
    "clip_weights": "none",
    "checkpoints_total_limit": 1,
}
CLOCKS = ("seconds", "processor")
PARTS = ("whole", "passes", "base", "wrapper")


def now() -> Any:
    """Seconds: those that went by, and the processor's in this process."""
    return np.array([time.perf_counter(), time.process_time()])


# -- a run -----------------------------------------------------------------------------------------


class Phases:
    """Seconds and memory, phase by phase.

    A file that is read through a mapping counts as resident, and the system takes its pages away
    where they are needed elsewhere. So the memory that a phase needs is its own pages at their
    peak, which are looked at all the time, and the libraries' files.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor: dict[str, float] = {}
        self.resident: dict[str, int] = {}
        self.needed: dict[str, int] = {}
        self.files, self.own = resident("RssFile"), 0
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.own = max(self.own, resident("RssAnon"))
            time.sleep(0.01)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident size
        self.own, start = 0, now()
        yield
        self.seconds[name], self.processor[name] = map(float, now() - start)
        self.resident[name] = resident("VmHWM")
        self.needed[name] = max(self.own, resident("RssAnon")) + self.files


def options(work: Path, case: str, tiny: bool, steps: int) -> Any:
    from ebu_optim.takedown.options import Forget

    tiny_only = {"resolution": 16, "architecture": work / "folder", "learning_rate": 1e-2}
    return Forget(
        pretrained_model_name_or_path=str(work / "model.safetensors"),
        forget=["cat"],
        remember_prompts=["a dog", "a red car"],
        output_dir=work / case.replace(", ", "_"),
        max_train_steps=steps,
        cpu=True,
        **FEW,
        **{"mixed_precision": "no", **CASES[case]},
        **(tiny_only if tiny else {"resolution": 256}),
    ).resolved()


def counted(args: Any) -> Any:
    from ebu_optim.text_to_image import memory, pipelines, prompts

    looked = pipelines.look(args, weights=False)
    return memory.count(args, looked, prompts.collect(args, looked.tokenizer))


def run(work: Path, case: str, tiny: bool, steps: int, threads: int) -> dict[str, Any]:
    """What `ebu forget` does, timed."""
    torch.set_num_threads(threads)
    args, libraries = options(work, case, tiny, steps), resident("VmRSS")
    cost = counted(args)
    row = {"case": case, "trained": cost.trained, "counted": cost.report()}
    if not tiny and cost.peak + GIB > (room := available() - SPARE):
        need = f"{(cost.peak + GIB) / GIB:.1f} GiB, {max(room, 0) / GIB:.1f} were free for it"
        return {**row, "left_out": f"it takes {need}"}
    others, load = Others(), os.getloadavg()
    phases, each = forget(args)
    after = os.getloadavg()
    steady = np.median(each[1:] or each, axis=0)  # the first brings in libraries
    return {
        **row,
        "libraries": libraries,
        "resident": phases.resident,
        "needed": phases.needed,
        "peak": max(phases.needed.values()),
        "seconds": phases.seconds,
        "processor": phases.processor,
        "steps": [named(spent) for spent in each],
        "step": named(steady),
        "wrapper_share": dict(zip(CLOCKS, steady[3] / steady[0])),
        "others": others.cores(),
        "load_before": load[0],
        "load_after": after[0],
    }


def named(spent: Any) -> dict[str, dict[str, float]]:
    """What `one_step` says, by its names."""
    return {clock: dict(zip(PARTS, column)) for clock, column in zip(CLOCKS, spent.T.tolist())}


def forget(args: Any) -> tuple[Phases, list[Any]]:
    """The parts of `ebu_optim.takedown.run.run`, one after the other."""
    from ebu_optim.takedown import evidence, pictures
    from ebu_optim.text_to_image import pipelines
    from ebu_optim.text_to_image.unlearn import unlearning

    phases = Phases()
    each: list[Any] = []
    with phases.phase("unpacking"):
        pipelines.fetch(args)
    opened = unlearning(args)
    with phases.phase("text and sets"):
        ready = opened.__enter__()
    with phases.phase("steps"):
        base = Timed(ready.opt.base)
        for step in ready.steps():
            each.append(one_step(ready, step, base))
    with phases.phase("result"):
        opened.__exit__(None, None, None)
    del opened, ready
    with phases.phase("report"):
        pictures.report(args)
    with phases.phase("evidence"):
        evidence.write(args)
    return phases, each


class Timed:
    """How long the last step of the optimizer `base` took."""

    def __init__(self, base: Any) -> None:
        self.step, self.spent = base.step, np.zeros(2)
        base.step = self.timed

    def timed(self, *args: Any, **more: Any) -> Any:
        start = now()
        result = self.step(*args, **more)
        self.spent = now() - start
        return result


def one_step(ready: Any, step: int, base: Timed) -> Any:
    """A row for each of `PARTS`: all of it, the passes, the base, and the rest, which is the
    wrapper's."""
    ready.losses.at(step - 1)
    passes, start = np.zeros(2), now()
    for name in ready.opt.needs:
        with getattr(ready.opt, name)():
            begin = now()
            ready.accelerator.backward(getattr(ready.losses, name)())
            passes += now() - begin
    ready.optimizer.step()
    ready.optimizer.zero_grad()
    whole = now() - start
    return np.stack([whole, passes, base.spent, whole - passes - base.spent])


# -- figures ---------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    head = ["trained", "counted + 1 GiB", "measured", "s a step", "of the processor", "wrapper"]
    lines = []
    for r in rows:
        line = [r["case"], f"{(r['counted']['peak'] + GIB) / GIB:.2f} GiB"]
        if "left_out" in r:
            lines.append([*line, f"left out: {r['left_out']}", "", "", ""])
            continue
        step = [f"{r['step'][clock]['whole']:.2f}" for clock in CLOCKS]
        share = f"{100 * r['wrapper_share']['processor']:.1f} %"
        lines.append([*line, f"{r['peak'] / GIB:.2f} GiB", *step, share])
    return report.aligned(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="every line in seconds, of no meaning")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="leave the files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from ebu_optim.files import need_disk

    work = Path(tempfile.mkdtemp(prefix="full_size_", dir=args.folder))
    os.environ["EBU_OPTIM_CACHE"] = str(work / "cache")
    try:
        need_disk(work, 1e7 if args.tiny else DISK, "the model and what is made of it")
        found = {
            "machine": machine(),
            "threads": args.threads,
            "source": apart(make, work, args.tiny),
        }
        rows = []
        for case in args.cases:
            rows.append(apart(run, work, case, args.tiny, args.steps, args.threads))
            if "left_out" not in rows[-1]:
                done = options(work, case, args.tiny, args.steps)
                rows[-1]["file"] = apart(compare, done)
                if not args.keep:
                    shutil.rmtree(done.output_dir)
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        print(f"files in {work}") if args.keep else shutil.rmtree(work)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
