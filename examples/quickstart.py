"""Make a trained diffusion model forget one digit, and show it with numbers and images.

    python examples/quickstart.py --forget 0

Everything ships with the package: real 8x8 digits (scikit-learn), a small class-conditional
UNet2DModel and two classifiers that were trained on them. It takes about a minute on two CPU cores.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam
from tqdm.auto import tqdm

import ebu_optim
from ebu_optim import EBUOptimizer
from ebu_optim.baselines import methods
from ebu_optim.checkpoint import load_checkpoint, save_checkpoint
from ebu_optim.diffusion import (
    Adversary,
    denoising_loss,
    distillation_loss,
    model_hash,
    next_class,
    noisy_condition,
    relabel_loss,
    sample_set,
    surrogate_noise,
)
from ebu_optim.errors import InputError
from ebu_optim.files import check_free, replacing_folder
from ebu_optim.training.command_line import command
from ebu_optim.training.fields import as_dict, at_least, flags, option
from ebu_optim.worlds import digits
from ebu_optim.worlds.digits_judged import PER_CLASS, Evaluation
from ebu_optim.worlds.digits_pages import card, curves, grid, table

CURVE_EVERY = 25
#: The optimizer's settings in the report.
SETTINGS = ("alpha", "delta", "gamma", "penalty", "update", "unrelated", "terms", "granularity")
SETTINGS += ("max_grad_norm", "fisher_scale")

FORGET = {
    "digit": "relabelling: the frozen model's prediction for the next digit, on real images",
    "noise": "denoising on uniform noise, noise on the condition up to its spread",
}


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    forget: int = option(0, help="The digit to forget, 0..9.")
    steps: int = option(200, help="Steps of unlearning.")
    batch_size: int = option(16, help="Images per step and task.")
    learning_rate: float = option(1e-4, help="Learning rate of Adam.")
    alpha: float = option(0.6, help="Weight of the forget gradient on the overlap.")
    delta: float = option(0.5, help="Share of the weights that each task selects.")
    gamma: float | None = option(None, help="Strength of the penalty. Default: EBUOptimizer's.")
    becomes: Literal["digit", "noise"] = option(
        "digit",
        help="What the model generates instead: the next digit, as the frozen model generates it, "
        "or noise as in the paper.",
    )
    remember: Literal["replay", "distill", "crossed"] = option(
        "crossed",
        help="Remember loss: replayed pairs, the frozen model's predictions on them, or "
        "predictions with newly sampled conditions.",
    )
    adversary_steps: int = option(
        0, help="Steps of an adversary in each step, towards an embedding that gives the digit."
    )
    seed: int = option(0, help="Seed of all random numbers of unlearning.")
    output_dir: Path = option(Path("outputs/quickstart"), help="Folder for the result.")
    device: str = option("cpu", help="Device to run on: cpu, cuda, cuda:1, ...")
    overwrite: bool = option(False, help="Replace a finished result.")
    train: bool = option(
        False, help="Train the shipped model and classifiers again (about 20 minutes)."
    )

    def __post_init__(self) -> None:
        if self.forget not in digits.CLASSES:
            raise InputError(f"--forget must be a digit, 0..9; got {self.forget}")
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "adversary_steps")
        given = {n: getattr(self, n) for n in ("alpha", "delta", "gamma")}
        try:
            methods["ebu_added"].needs(**{n: v for n, v in given.items() if v is not None})
        except ValueError as error:
            raise InputError(f"--{error}") from error
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} is not available here: {error}") from error
        if not self.train:
            check_free(self.output_dir, is_result, self.overwrite)


def is_result(folder: Path) -> bool:
    """Whether this script wrote the folder, and may therefore replace it with --overwrite."""
    try:
        found = json.loads((folder / "metrics.json").read_text())
        return {"before", "after", "protocol"} <= found.keys()
    except (OSError, ValueError, AttributeError):
        return False


def unlearn(model: Any, args: Quickstart, evaluation: Evaluation, work: Path) -> dict[str, Any]:
    """Unlearn, from the last checkpoint in `work` on.

    Returns:
        The curve, the seconds and the optimizer's settings.
    """
    device, scheduler = args.device, digits.scheduler()
    generator = torch.Generator().manual_seed(args.seed)
    kept = torch.tensor([c for c in digits.CLASSES if c != args.forget])
    teacher = digits.load_unet(device).eval()
    images, labels = sample_set(
        work / "replay.safetensors",
        model,
        evaluation.ddim,
        kept.repeat_interleave(30),
        digits.SHAPE,
        num_inference_steps=20,
        batch_size=90,
        seed=args.seed,
        device=device,
    )
    images, labels = images.to(device), labels.to(device)

    options = {} if args.gamma is None else {"gamma": args.gamma}
    opt = EBUOptimizer(
        Adam(model.parameters(), lr=args.learning_rate),
        alpha=args.alpha,
        delta=args.delta,
        max_grad_norm=1.0,
        **options,
    )
    target = torch.full((args.batch_size,), args.forget, device=device)
    eval_labels = torch.cat([torch.full((36,), args.forget), kept.repeat_interleave(4)])
    done: dict[str, Any] = {"curve": [], "seconds": 0.0}
    run = {"model": model, "opt": opt, "generator": generator, "done": done}
    pictures, shown, _, _ = digits.images()
    real, adversary = pictures[shown == args.forget].to(device), None
    if args.adversary_steps:
        adversary = Adversary(
            model.class_embedding, [args.forget], steps=args.adversary_steps, seed=args.seed
        )
        run["adversary"] = adversary
    begin = load_checkpoint(work / "run", run, fallback=True)

    def forget_loss() -> Tensor:
        if args.becomes == "digit":
            i = torch.randint(len(real), (args.batch_size,), generator=generator).to(device)
            return relabel_loss(
                model,
                real[i],
                target,
                next_class(target, len(digits.CLASSES), forgotten=[args.forget]),
                scheduler,
                teacher=teacher,
                generator=generator,
                reduction="sum",
            )
        x = surrogate_noise(
            "uniform", (args.batch_size, *digits.SHAPE), generator=generator, device=device
        )
        with noisy_condition(model.class_embedding, 1.0, generator=generator):
            return denoising_loss(model, x, target, scheduler, generator=generator)

    def attack(label: int, draws: torch.Generator) -> Tensor:
        i = torch.randint(len(real), (args.batch_size,), generator=draws).to(device)
        return denoising_loss(model, real[i], target, scheduler, generator=draws)

    def remember_loss() -> Tensor:
        i = torch.randint(len(images), (args.batch_size,), generator=generator).to(device)
        if args.remember == "replay":
            return denoising_loss(model, images[i], labels[i], scheduler, generator=generator)
        return distillation_loss(
            model,
            teacher,
            images[i],
            labels[i],
            scheduler,
            generator=generator,
            crossed=kept if args.remember == "crossed" else None,
        )

    def look(step: int) -> None:
        measured = evaluation.measure(
            evaluation.draw(model, eval_labels, seed=2, steps=10), eval_labels
        )
        row = {"step": step, "seconds": done["seconds"], **measured}
        stats = opt.stats
        row |= {k: stats[k] for k in ("overlap", "overlap_lift", "cosine", "total") if stats}
        done["curve"].append(row)

    if not begin:
        look(0)
    model.train()
    bar = tqdm(
        range(begin + 1, args.steps + 1), f"forgetting {args.forget}", args.steps, initial=begin
    )
    for step in bar:
        start = time.perf_counter()
        if adversary:
            adversary.step(attack)
        with opt.forget():
            loss_f = forget_loss()
            loss_f.backward()
            if adversary:
                with adversary.at():
                    (0.1 * forget_loss()).backward()
        with opt.remember():
            loss_r = remember_loss()
            loss_r.backward()
        opt.step()
        done["seconds"] += time.perf_counter() - start
        if step % CURVE_EVERY == 0 or step == args.steps:
            look(step)
            model.train()
            save_checkpoint(work / "run", step, run)
            bar.set_postfix({k: f"{done['curve'][-1][k]:.3f}" for k in ("p_f_reject", "ra_reject")})
    settings = {name: getattr(opt, name) for name in SETTINGS}
    return {**done, "settings": {**settings, "fisher": "online"}}


def main(args: Quickstart) -> None:
    if args.train:
        digits.train()
        return
    same = {k: str(v) for k, v in as_dict(args).items() if k not in ("output_dir", "overwrite")}
    same |= {"torch": torch.__version__, "ebu_optim": ebu_optim.__version__}
    with replacing_folder(args.output_dir, resume=same) as work:
        metrics = quickstart(args, work)
    print(f"\n{table(metrics)}\n\nin {metrics['seconds']['all']:.0f} s; see {args.output_dir}/")


def quickstart(args: Quickstart, work: Path) -> dict[str, Any]:
    """Forget, measure, and write everything into the folder `work`."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    evaluation = Evaluation(args.forget, args.device)
    model = digits.load_unet(args.device)
    original = model_hash(model)
    labels = torch.tensor(digits.CLASSES).repeat_interleave(PER_CLASS)
    before_images = evaluation.draw(model, labels, seed=1)
    before = {**evaluation.measure(before_images, labels), **evaluation.depth(model)}
    run = unlearn(model, args, evaluation, work)
    after_images = evaluation.draw(model, labels, seed=1)
    after = {**evaluation.measure(after_images, labels), **evaluation.depth(model)}

    metrics = {
        "before": before,
        "after": after,
        "noise": evaluation.noise(),
        "curve": run["curve"],
        "protocol": {
            "forget": args.forget,
            "replayed_classes": [c for c in digits.CLASSES if c != args.forget],
            "steps": args.steps,
            "batch_size": args.batch_size,
            "optimizer": "Adam",
            "learning_rate": args.learning_rate,
            **run["settings"],
            "becomes": args.becomes,
            "forget_loss": FORGET[args.becomes],
            "adversary_steps": args.adversary_steps,
            "remember_loss": args.remember,
            "reduction": "sum over C, H, W, mean over the batch",
            "replay": "30 images a class, DDIM 20 steps, no guidance",
            "evaluation": {
                "images_per_class": PER_CLASS,
                "sampler": "DDIM, 20 steps, eta 0",
                "guidance": None,
                "sampled_weights": "the trained ones, no EMA",
                "classifiers": "ten classes; for _reject and the attacks eleven, the last is noise",
                "same_starting_noise_before_and_after": True,
                "curve": "36 + 36 images, DDIM 10 steps",
            },
            "attacks": {
                "inversion_100": "a new class embedding, Adam 0.1, batch 32, 100 steps",
                "relearn_10": "all weights, Adam 1e-4, batch 32, 10 steps",
                "images": "the real training images of the digit",
            },
            "base_model": original,
        },
        "seeds": {"unlearning": args.seed, "evaluation": 1, "curve": 2, "attacks": [0, 3]},
        "seconds": {"unlearning": run["seconds"], "all": time.perf_counter() - start},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": __import__("diffusers").__version__,
            "ebu_optim": ebu_optim.__version__,
            "device": str(args.device),
            "threads": torch.get_num_threads(),
        },
    }
    grid(before_images, after_images, labels, args.forget, work / "before_after.png")
    curves(run["curve"], metrics["noise"], work / "curves.png")
    model.cpu().save_pretrained(work / "model")
    shutil.rmtree(work / "run")
    said = shlex.join(["python", "examples/quickstart.py", *flags(args)])
    (work / "README.md").write_text(card(metrics, said))
    (work / "metrics.json").write_text(json.dumps(metrics, indent=1))
    return metrics


if __name__ == "__main__":
    command(main, Quickstart, __doc__)
