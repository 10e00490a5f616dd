"""How the defaults were chosen: EBU's variants and its rivals on three axes, on digits.

Every run forgets "0" from the quickstart's model in 200 steps and is measured on three axes:
forgotten (P_f by a classifier with a reject class), kept (accuracy on the other digits; in partial
replay, where only 1, 2 and 3 are replayed, on the other six) and deep (P_f after a new embedding
was learned on real zeros with frozen weights, and after relearning). The strength of every method
is tuned on seed 0 from the same list, for each regime and remember loss. Results are reported on
seeds 1, 2 and 3. Each run has one JSON file, and a second start only makes the missing runs.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch.optim import Adam
from tqdm.auto import tqdm

from .. import DiagonalFisher, EBUOptimizer
from ..baselines import EmbeddingOnly, Joint, RandomMasks, SelectiveAmnesia
from ..diffusion import (
    FisherBatches,
    denoising_loss,
    distillation_loss,
    fisher_loss,
    sample,
    sample_set,
    surrogate_noise,
)
from ..files import replacing
from ..metrics import accuracy, classify, entropy, probability
from ..metrics.depth import condition_replaced, learn_embedding, relearn
from ..optim import PhasedOptimizer
from ..worlds import digits
from . import evidence_report as report
from .evidence_report import GAMMAS, LOSSES, REGIMES, SEEDS, TUNE_SEED, TUNED

FORGET, REPLAYED, NEVER = 0, (1, 2, 3), (4, 5, 6, 7, 8, 9)
STEPS, BATCH, LR, CLIP, SAMPLER_STEPS = 200, 16, 1e-4, 1.0, 10


def name(spec: dict[str, Any]) -> str:
    options = "_".join(
        f"{k}{v if isinstance(v, str) else format(v, 'g')}" for k, v in spec["options"].items()
    )
    return f"{spec['regime']}-{spec['loss']}-{spec['method']}-{options or 'plain'}-s{spec['seed']}"


def build(spec: dict[str, Any], model: Any, images: Any, labels: Any) -> PhasedOptimizer:
    options = {k: v for k, v in spec["options"].items() if k != "reduction"}
    if options.get("fisher") == "diagonal":
        batches = FisherBatches(images, labels, digits.scheduler(), timesteps=16)
        fisher = DiagonalFisher.estimate(
            model, fisher_loss(digits.scheduler()), batches, method="hooks", progress=False
        )
        options["fisher"] = fisher.for_model(model)
    method = spec["method"]
    if method == "embedding":  # best on the paper's metrics, but its forgetting is not deep
        embedding = model.class_embedding
        base = Adam(embedding.parameters(), lr=1e-2)
        return EmbeddingOnly(base, embedding=embedding, max_grad_norm=CLIP)
    base = Adam(model.parameters(), lr=LR)
    if method in ("joint", "base"):
        return Joint(base, max_grad_norm=CLIP)
    if method == "full":  # gamma is 2 lambda on EBU's scale of F
        lam = options.pop("gamma") / 2
        return SelectiveAmnesia(
            base, fisher="online", fisher_scale="unit", lam=lam, max_grad_norm=CLIP, **options
        )
    if method == "random":  # independent masks of density delta, whose overlap is by chance
        return RandomMasks(base, independent=True, seed=spec["seed"], max_grad_norm=CLIP, **options)
    return EBUOptimizer(base, update=method, max_grad_norm=CLIP, **{"gamma": 0.0, **options})


def run(spec: dict[str, Any], folder: Path) -> None:
    """Make one run, from the pretrained model to its JSON file."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    g = torch.Generator().manual_seed(1000 + spec["seed"])
    noise_scheduler = digits.scheduler()
    ddim = DDIMScheduler.from_config(noise_scheduler.config)
    plain, reject = digits.load_classifiers()
    model, teacher = digits.load_unet().train(), digits.load_unet().eval()
    kept = [c for c in digits.CLASSES if c != FORGET]
    images, labels = replay(folder)
    chosen = torch.isin(labels, torch.tensor(REPLAYED if spec["regime"] == "partial" else kept))
    images, labels = images[chosen], labels[chosen]
    optimizer = build(spec, model, images, labels)
    crossed = torch.tensor(kept) if spec["loss"] == "crossed" else None
    how = {"reduction": spec["options"].get("reduction", "sum"), "generator": g}

    def draw(net: Any, classes: Any, each: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tensor(classes).repeat_interleave(each)
        x = sample(
            net.eval(),
            ddim,
            y,
            digits.SHAPE,
            num_inference_steps=SAMPLER_STEPS,
            generator=torch.Generator().manual_seed(seed),
        )
        return x, y

    def measure() -> dict[str, float]:
        x, y = draw(model, digits.CLASSES, 40)
        logits, logits_reject = classify(plain, x), classify(reject, x)
        f = y == FORGET
        groups = {"never": NEVER, "replayed": REPLAYED, "kept": kept}
        result = {"p_f_reject": probability(logits_reject[f], FORGET), "ce_f": entropy(logits[f])}
        result["ce_r"] = entropy(logits[~f])
        for key, classes in groups.items():
            m = torch.isin(y, torch.tensor(classes))
            result[f"acc_{key}"] = accuracy(logits[m], y[m])
        return result

    curve, seconds = {}, 0.0
    for step in range(0 if spec["method"] == "base" else STEPS):
        start = time.perf_counter()
        x = surrogate_noise("uniform", (BATCH, *digits.SHAPE), generator=g)
        with optimizer.forget():
            denoising_loss(
                model, x, torch.full((BATCH,), FORGET), noise_scheduler, **how
            ).backward()
        i = torch.randint(len(images), (BATCH,), generator=g)
        with optimizer.remember():
            if spec["loss"] == "replay":
                loss = denoising_loss(model, images[i], labels[i], noise_scheduler, **how)
            else:
                loss = distillation_loss(
                    model,
                    teacher,
                    images[i],
                    labels[i],
                    noise_scheduler,
                    crossed=crossed,
                    **how,
                )
            loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step + 1 == STEPS // 2:
            curve[step + 1] = measure()
            model.train()

    x_train, y_train, _, _ = digits.images()
    real = x_train[y_train == FORGET]
    vector = learn_embedding(model, model.class_embedding, real, noise_scheduler, steps=100)
    with condition_replaced(model.class_embedding, vector):
        inverted = classify(reject, draw(model, [FORGET], 60)[0])
    again = relearn(model, real, FORGET, noise_scheduler, steps=10)
    relearned = classify(reject, draw(again, [FORGET], 60)[0])
    result = {
        "spec": spec,
        "curve": curve,
        **measure(),
        "inversion_100": probability(inverted, FORGET),
        "relearn_10": probability(relearned, FORGET),
        "seconds": seconds,
        "stats": optimizer.stats,
        "fisher_mean": fisher_mean(optimizer),
    }
    with replacing(folder / "runs" / f"{name(spec)}.json") as path:
        path.write_text(json.dumps(result, indent=1))


def fisher_mean(optimizer: Any) -> float | None:
    try:
        found = [optimizer.fisher_of(p) for g in optimizer.param_groups for p in g["params"]]
    except KeyError:
        return None
    return float(sum(f.sum(dtype=torch.float64) for f in found)) / sum(f.numel() for f in found)


def replay(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    ddim = DDIMScheduler.from_config(digits.scheduler().config)
    return sample_set(
        folder / "replay.safetensors",
        digits.load_unet(),
        ddim,
        torch.arange(10).repeat_interleave(60),
        digits.SHAPE,
        num_inference_steps=20,
        batch_size=200,
    )


def spec(regime: str, loss: str, method: str, seed: int, **options: Any) -> dict[str, Any]:
    return {"regime": regime, "loss": loss, "method": method, "seed": seed, "options": options}


def tuning() -> list[dict[str, Any]]:
    """The runs of tuning on seed 0: the same strengths for every method, regime and loss."""
    runs = []
    for regime in REGIMES:
        for loss in LOSSES:
            runs.append(spec(regime, loss, "joint", TUNE_SEED))
            runs.append(spec(regime, loss, "added", TUNE_SEED, gamma=0.0))
            runs += [spec(regime, loss, m, TUNE_SEED, gamma=g) for m in TUNED for g in GAMMAS]
    return runs


def reporting(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs on seeds 1 to 3 at the tuned strengths."""
    runs = [spec("partial", "replay", "base", SEEDS[0])]
    for seed in SEEDS:
        for regime in REGIMES:
            for loss in LOSSES:
                runs.append(spec(regime, loss, "joint", seed))
                runs.append(spec(regime, loss, "added", seed, gamma=0.0))
                for method in TUNED:
                    gamma = report.tuned(results, regime, loss, method)["spec"]["options"]["gamma"]
                    runs.append(spec(regime, loss, method, seed, gamma=gamma))
        runs.append(spec("partial", "replay", "embedding", seed))
        for loss in LOSSES:
            gamma = report.tuned(results, "partial", loss, "added")["spec"]["options"]["gamma"]
            for alpha in (0.0, 1.0):
                runs.append(spec("partial", loss, "added", seed, gamma=gamma, alpha=alpha))
        # The scale of F: the same gamma with another reduction, for "unit" and for a "raw" that
        # equals it with the sum. Also F from per-sample gradients at theta0.
        best = report.tuned(results, "partial", "replay", "added")
        gamma = best["spec"]["options"]["gamma"]
        raw = float(f"{gamma / best['fisher_mean'] ** 0.5:.3g}")
        here = ("partial", "replay", "added", seed)
        runs.append(spec(*here, gamma=gamma, reduction="mean"))
        runs.append(spec(*here, gamma=raw, fisher_scale="raw"))
        runs.append(spec(*here, gamma=raw, fisher_scale="raw", reduction="mean"))
        runs.append(spec(*here, gamma=gamma, fisher="diagonal"))
    return runs


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((folder / "runs").glob("*.json"))]


def execute(
    specs: list[dict[str, Any]],
    folder: Path,
    workers: int,
    desc: str,
    *,
    run: Callable[[dict[str, Any], Path], None] = run,
    name: Callable[[dict[str, Any]], str] = name,
) -> None:
    """Make the runs that the folder lacks.

    Args:
        name: spec -> the name of the run's file.
    """
    missing = [s for s in specs if not (folder / "runs" / f"{name(s)}.json").exists()]
    print(f"{desc}: {len(missing)} of {len(specs)} runs to do")
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        jobs = [pool.apply_async(run, (s, folder)) for s in missing]
        for job in tqdm(jobs, desc=desc):
            job.get()


def write(folder: Path) -> None:
    """Write the report of the finished runs."""
    protocol = {
        "command": "python examples/evidence.py",
        "forget": FORGET,
        "replayed": REPLAYED,
        "never": NEVER,
        "steps": STEPS,
        "batch": BATCH,
        "lr": LR,
        "max_grad_norm": CLIP,
        "surrogate": "uniform",
        "reduction": "sum",
        "fisher": "online",
        "fisher_scale": "unit",
        "sampler": f"DDIM, {SAMPLER_STEPS} steps",
        "samples_per_class": 40,
        "threads": 1,
        "accuracy_by": "the ten-class classifier",
        "p_f_reject_by": "the one with a reject class",
        "shared_by_all_runs": "starting noise (seed 7, 60 images for the attacks), attack seed 0",
    }
    report.write(load(folder), folder, protocol)
