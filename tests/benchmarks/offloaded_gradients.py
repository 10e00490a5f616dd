"""Gradients of a LoRA over a frozen transformer whose weights diffusers moves or rounds.

    PYTHONPATH=. python tests/benchmarks/offloaded_gradients.py --json offloaded_gradients.json

For each family of flow matching in small, with gradient checkpointing and without: the cosine of
the LoRA's gradient to that over the frozen weights as they are, and its length beside. Layerwise
casting keeps the frozen weights in 8 or 16 bits between the passes. Group offloading keeps them
elsewhere, on a CPU in files: what it does there stands for what it does beside a card.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from measure import machine

from tests.flow_families import MADE, module, prompted

NAMES = ("sd3", "flux_dev", "klein", "z_image", "qwen_image", "sana")
CASTING = {"casting, float8": torch.float8_e4m3fn, "casting, bfloat16": torch.bfloat16}
OFFLOADING: dict[str, dict[str, Any]] = {
    "offloading, blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "offloading, leaves": {"offload_type": "leaf_level"},
}
TEXTS = ["a cat", "a red car"]


def gradient(work: Path, name: str, how: str, checkpointed: bool) -> torch.Tensor:
    args, looked, model = prompted(work / name, TEXTS, work, "--train_modules", "lora")
    if how in CASTING:  # before the adapters, which stay as they are
        model.denoiser.enable_layerwise_casting(
            storage_dtype=CASTING[how],
            compute_dtype=torch.float32,
            skip_modules_classes=(torch.nn.Conv2d,),
        )
    module("modules").choose(model.denoiser, args, looked.family)
    g = torch.Generator().manual_seed(0)
    for p in model.trained().values():
        p.data = torch.randn(p.shape, generator=g) / 20
    if how in OFFLOADING:
        files = work / f"{name} {how} {checkpointed}"
        model.denoiser.enable_group_offload(
            onload_device=torch.device("cpu"), offload_to_disk_path=str(files), **OFFLOADING[how]
        )
    if checkpointed:
        model.denoiser.enable_gradient_checkpointing()
    x, t = torch.randn(2, *looked.latents, generator=g), torch.tensor([700.0, 200.0])
    (model(x, t, torch.arange(2)).float() - x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.trained().values()])


def row(work: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"family": name}
    for checkpointed in (False, True):
        right = gradient(work, name, "", checkpointed)
        for how in (*CASTING, *OFFLOADING):
            g = gradient(work, name, how, checkpointed)
            finite = bool(g.isfinite().all())
            cosine = torch.cosine_similarity(right.double(), g.double(), dim=0).item()
            length = (g.double().norm() / right.double().norm()).item()
            of = {"cosine": cosine, "length": length} if finite else {"finite": False}
            found[f"{how}{', checkpointed' * checkpointed}"] = of
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = [n for n in rows[0] if n != "family"]
    lines = [[n, *(said(r[n]) for r in rows)] for n in names]
    return report.aligned(["", *(r["family"] for r in rows)], lines)


def said(of: dict[str, Any]) -> str:
    if not of.get("finite", True):
        return "NaN"
    return f"{of['cosine']:.4f}" if 0.5 < of["length"] < 2 else f"length {of['length']:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import diffusers

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.families:
            MADE[name](Path(folder) / name)
            rows.append(row(Path(folder), name))
    print(table(rows))
    found = {"machine": machine(), "diffusers": diffusers.__version__, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
