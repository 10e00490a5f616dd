"""Parts of `gpu.py` that are whole runs: NCCL, NVIDIA's sanitizer, memory of Stable Diffusion."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ebu_optim import EBUOptimizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: What compute-sanitizer looks for: accesses out of bounds, races, memory never written, barriers.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PATIENCE = 3600  # seconds, to end a hang


def python(*arguments: object, before: tuple[str, ...] = (), **environ: str) -> dict[str, Any]:
    """`BEFORE python ARGUMENTS` to its end: the exit code, and the end of what it said."""
    done = subprocess.run(
        [*before, sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return {"code": done.returncode, "said": done.stdout[-2000:]}


# -- processes ------------------------------------------------------------------------------------


def distributed(bench: Any) -> list[dict[str, Any]]:
    """One rank on the card, by NCCL: what DDP and FSDP2 train is what the model alone does."""
    backend = "gloo" if bench.dry else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone = trained(bench, lambda model: model)
        rows = []
        for name, wrap in {"DDP": DistributedDataParallel, "FSDP2": sharded(bench)}.items():
            if isinstance(wrap, str):
                rows.append({"wrapped by": name, "skipped": wrap})
                continue
            found = trained(bench, wrap)
            assert all(a.equal(b) for a, b in zip(alone, found, strict=True)), name
            rows.append({"wrapped by": name, "backend": backend, "equal": True})
    finally:
        dist.destroy_process_group()
    return rows


def sharded(bench: Any) -> Any:
    """FSDP2's wrapper, or why there is none."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        return f"this torch has none: {error}"
    mesh = dist.init_device_mesh(bench.device.type, (1,))
    return lambda model: fully_shard(model, mesh=mesh)


def trained(bench: Any, wrap: Any) -> list[Tensor]:
    """The weights after three steps of a small network."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 16))
    model = wrap(nn.Sequential(*layers).to(bench.device))
    opt = EBUOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), max_grad_norm=1.0)
    x, y = torch.randn(2, 8, 16).to(bench.device)
    for _ in range(3):
        opt.step(
            forget=lambda: model(x).square().mean().neg().backward(),
            remember=lambda: model(y).square().mean().backward(),
        )
        opt.zero_grad()
    weights = [p.detach() for p in model.parameters()]
    return [getattr(w, "full_tensor", lambda w=w: w)().clone() for w in weights]


# -- sanitizer ------------------------------------------------------------------------------------


def sanitizer(bench: Any) -> list[dict[str, Any]]:
    """The kernels' exactness once more at small sizes, under each of compute-sanitizer's tools."""
    found = None if bench.dry else shutil.which("compute-sanitizer")
    if not bench.dry and found is None:
        return [{"skipped": "compute-sanitizer is not on the path (it comes with CUDA's toolkit)"}]
    rows = []
    for tool in TOOLS[: 1 if bench.dry else None]:
        # each tensor in an allocation of its own: what leaves it is seen
        done = python(
            HERE / "gpu.py",
            "--only",
            "exact",
            "--dry-run" if bench.dry else "--small",
            before=(found, "--tool", tool, "--error-exitcode", "9") if found else (),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        rows.append({"tool": tool, "clean": done["code"] == 0, **done})
    return rows


# -- memory ---------------------------------------------------------------------------------------


def memory(bench: Any) -> list[dict[str, Any]]:
    """Unlearning runs of SD 1.x with random weights: the memory that was counted before, and that
    was measured."""
    if importlib.util.find_spec("transformers") is None:
        return [{"skipped": "transformers is not installed"}]
    spec: Any = importlib.util.spec_from_file_location("small", HERE.parent / "text_to_image.py")
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = small.pipeline(Path(folder) / "base", full=not bench.dry)
        for modules in ("xattn", "full")[bench.dry :]:
            for precision in ("fp16", "bf16")[bench.dry :]:
                out = Path(folder) / f"{modules} {precision}"
                rows.append({"trained": modules, "precision": precision})
                rows[-1] |= unlearned(base, out, modules, precision, bench.dry)
    return rows


def unlearned(base: Path, out: Path, modules: str, precision: str, dry: bool) -> dict[str, Any]:
    """One run of two steps in a process of its own."""
    few = ["--replay_images", 2, "--surrogate_images", 2, "--forget_images", 2]
    few += ["--num_inference_steps", 2, "--max_train_steps", 2, "--train_batch_size", 1]
    done = python(
        ROOT / "examples" / "stable_diffusion" / "unlearn.py",
        "--output_dir",
        out,
        "--forget",
        "cat",
        "--remember",
        "a dog",
        "",
        "--pretrained_model_name_or_path",
        base,
        "--sets_dir",
        base.with_name("sets"),
        "--train_modules",
        modules,
        "--mixed_precision",
        precision,
        "--validation_steps",
        0,
        *few,
    )
    if done["code"]:
        return done
    told = json.loads((out / "unlearn.json").read_text())
    counted, measured = told["memory_counted"]["peak"], told["memory_measured"]
    beyond = None if dry else measured - counted
    return {"counted": counted, "measured": measured, "measured beyond": beyond, "code": 0}
