"""DiagonalFisher against one sample and one timestep at a time, on the same work.

    python tests/benchmarks/bench_fisher.py

The work: per-sample gradients of a small conditional UNet2DModel, squared and averaged. The
comparison runs one backward pass for every sample and timestep (what published code does) and
averages a sample's timesteps before squaring, which is the same estimate to rounding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ebu_optim import DiagonalFisher
from ebu_optim.diffusion import FisherBatches, fisher_loss
from ebu_optim.fisher._per_sample import METHODS


def one_at_a_time(model, loss, batches) -> dict[str, torch.Tensor]:
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    count = 0
    for batch in batches:
        for i in range(len(batch["t"])):
            mean = {name: torch.zeros_like(p) for name, p in params.items()}
            draws = batch["t"].shape[1]
            for j in range(draws):
                one = {k: v[i : i + 1] for k, v in batch.items()}
                one |= {"t": one["t"][:, j : j + 1], "noise": one["noise"][:, j : j + 1]}
                grads = torch.autograd.grad(loss(model, one).sum(), list(params.values()))
                for m, g in zip(mean.values(), grads, strict=True):
                    m += g / draws
            for t, m in zip(total.values(), mean.values(), strict=True):
                t += m.square()
            count += 1
    return {name: t / count for name, t in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = (
        UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(24, 48),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
            num_class_embeds=11,
        )
        .eval()
        .to(args.device)
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    loss = fisher_loss(scheduler)
    x = torch.rand(args.samples, 1, 8, 8) * 2 - 1
    y = torch.arange(args.samples) % 10
    rows = []
    for timesteps in args.timesteps:
        batches = FisherBatches(
            x,
            y,
            scheduler,
            timesteps=timesteps,
            cross=False,
            batch_size=args.batch_size,
            device=args.device,
        )
        ways = {"one at a time": lambda b=batches: one_at_a_time(model, loss, b)}
        for method in METHODS:
            ways[method] = lambda b=batches, m=method: (
                DiagonalFisher.estimate(model, loss, b, method=m, progress=False).tensors
            )
        times: dict[str, list[float]] = {name: [] for name in ways}
        results = {}
        for i in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                results[name] = torch.cat([t.flatten().cpu() for t in way().values()])
                if i:
                    times[name].append(time.perf_counter() - start)
        slow = statistics.median(times["one at a time"])
        reference = results["one at a time"]
        for name in ways:
            seconds = statistics.median(times[name])
            error = float((results[name] - reference).norm() / reference.norm())
            row = {
                "timesteps": timesteps,
                "way": name,
                "seconds": seconds,
                "times_faster": slow / seconds,
                "relative_difference": error,
            }
            rows.append(row)
            print(
                f"T'={timesteps:<3}{name:15}{seconds:>8.2f} s{slow / seconds:>7.1f}x"
                f"   difference {error:.1e}"
            )
    if args.json:
        document = {
            "torch": torch.__version__,
            "threads": args.threads,
            "device": args.device,
            "samples": args.samples,
            "batch_size": args.batch_size,
            "rows": rows,
        }
        args.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
