"""The memory of a step of `ebu forget` on a transformer of flow matching, counted and measured.

    PYTHONPATH=. python tests/benchmarks/transformer_memory.py --json transformer_memory.json

A Stable Diffusion 3 of 45 million parameters is made here, with random weights, in float32 and on
the CPU. Each case is a process of its own, whose allocator gives back what it does not need. After
a run of a tiny model, which brings in libraries, measured is the rise of the resident size at its
peak during the steps; beside it the count of the phase "unlearning" that the command says before.
Not of quantized weights: the pages of the file that they were made of stay mapped beside them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from measure import machine, resident

from tests.scripts import reset_accelerate
from tests.text_to_image import sd3

MIB = 2**20
SIZE = {
    "num_layers": 5,
    "attention_head_dim": 64,
    "num_attention_heads": 8,
    "sample_size": 32,
    "caption_projection_dim": 512,
}
LORA: dict[str, Any] = {"train_modules": "lora", "save_as": "lora"}
CASES: dict[str, dict[str, Any]] = {
    "full": {"train_modules": "full"},
    "attention": {"train_modules": "attention"},
    "xattn": {"train_modules": "xattn"},
    "LoRA, rank 4": LORA,
    "full, checkpointing": {"train_modules": "full", "gradient_checkpointing": True},
    "LoRA, checkpointing": {**LORA, "gradient_checkpointing": True},
}
#: Blocks of more than so many bytes go back to the system when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def options(folder: Path, out: Path, case: str, resolution: int) -> Any:
    from ebu_optim.takedown.options import Forget

    return Forget(
        pretrained_model_name_or_path=str(folder),
        forget=["cat"],
        preset="paper",
        remember_prompts=["a dog", "a red car"],
        output_dir=out,
        max_train_steps=3,
        cpu=True,
        mixed_precision="no",
        resolution=resolution,
        replay_images=1,
        surrogate_images=1,
        num_inference_steps=2,
        sample_batch_size=1,
        fisher_images=2,
        validation_steps=0,
        evidence_images=0,
        clip_weights="none",
        **CASES[case],
    ).resolved()


def steps(args: Any) -> int:
    """Bytes at the peak of the resident size during the steps."""
    from ebu_optim.text_to_image.unlearn import unlearning

    with unlearning(args) as ready:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak of the resident size
        ready.finish()
        return resident("VmHWM")


def run(work: Path, case: str) -> dict[str, Any]:
    from ebu_optim.text_to_image import memory, pipelines, prompts

    steps(options(work / "tiny", work / "warm", case, 16))
    reset_accelerate()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    args = options(work / "model", work / "out", case, 64)
    looked = pipelines.look(args, weights=False)
    cost = memory.count(args, looked, prompts.collect(args, looked.tokenizer))
    counted = sum(cost.phases["unlearning"].values())
    return {
        "case": case,
        "trained": cost.trained,
        "counted": counted,
        "measured": steps(args) - before,
        "rows": cost.phases["unlearning"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            r["case"],
            f"{r['trained'] / 1e6:.2f} M",
            f"{r['counted'] / MIB:.0f}",
            f"{r['measured'] / MIB:.0f}",
            f"{r['counted'] / r['measured']:.2f}",
        ]
        for r in rows
    ]
    return report.aligned(["", "trained", "counted, MiB", "measured, MiB", "ratio"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "CASE"), help="in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(Path(args.one[0]), args.one[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sd3(work / "tiny")
        sd3(work / "model", **SIZE)
        for case in args.cases:
            for of_another in ("out", "warm"):
                shutil.rmtree(work / of_another, ignore_errors=True)
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(work), case],
                check=True,
                text=True,
                env={**os.environ, **ALLOCATOR},
                stdout=subprocess.PIPE,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    found = {"machine": machine(), "torch": torch.__version__, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
