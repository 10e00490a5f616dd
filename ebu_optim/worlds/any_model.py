"""Forget a digit in any conditional generative model: options, measures, table and figure.

examples/vae.py and examples/gan.py use it.

A model is a module with an ``embedding`` of the condition and ``draw(labels, generator)``. A loss
is ``loss(model, images, labels, generator)``, the one that trains the model on its images.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..diffusion import surrogate_noise
from ..errors import InputError
from ..files import check_free, replacing_folder
from ..metrics import (
    accuracy,
    classify,
    inversion,
    probability,
    relearn_steps,
    versions,
)
from ..metrics.depth import Loss
from ..optim import EBUOptimizer
from . import digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PER_CLASS = 100  # images of each class on which every figure is measured
AT = (100, 200)  # steps of learning a new condition
SETTINGS = ("alpha", "delta", "gamma", "fisher_scale", "penalty", "update", "max_grad_norm")
RELEARN = 200  # steps after which relearning gives up


def parse(
    script: str, description: str | None, train_steps: int, argv: list[str] | None = None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forget", type=int, default=0, help="The digit to forget, 0..9.")
    parser.add_argument("--steps", type=int, default=200, help="Steps of forgetting.")
    parser.add_argument(
        "--train_steps", type=int, default=train_steps, help="Steps of training the base model."
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="Learning rate of forgetting."
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the base model and of forgetting."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs") / script)
    parser.add_argument("--overwrite", action="store_true", help="Replace a finished result.")
    args = parser.parse_args(argv)
    args.script = script
    if args.forget not in digits.CLASSES:
        parser.error(f"--forget must be a digit, 0..9; got {args.forget}")
    for name, least in (("steps", 1), ("train_steps", 1), ("batch_size", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be >= {least}; got {getattr(args, name)}")
    if not 0 < args.learning_rate < float("inf"):
        parser.error(f"--learning_rate must be > 0 and finite; got {args.learning_rate}")
    try:
        check_free(args.output_dir, lambda out: is_result(out, script), args.overwrite)
    except InputError as error:
        parser.error(str(error))
    return args


def is_result(folder: Path, script: str) -> bool:
    """Whether this script wrote the folder, and may therefore replace it with --overwrite."""
    try:
        return json.loads((folder / "results.json").read_text())["script"] == script
    except (OSError, ValueError, KeyError, TypeError):
        return False


def kept_labels(forget: int, n: int, generator: torch.Generator) -> Tensor:
    """(n,) labels sampled from the nine other digits."""
    kept = torch.tensor([c for c in digits.CLASSES if c != forget])
    return kept[torch.randint(len(kept), (n,), generator=generator)]


@torch.no_grad()
def drawn(model: Any, labels: Tensor) -> Tensor:
    """Images of `labels`, generated with the same random numbers for every model."""
    return model.draw(labels, torch.Generator().manual_seed(1))


def measure(
    model: Any, forget: int, real: Tensor, loss: Loss, learning_rate: float
) -> dict[str, float | None]:
    """Measure the three axes: forgotten, kept and deep.

    Args:
        real, loss: images of the digit and the model's loss, which the attacks use.
    """
    plain, reject = digits.load_classifiers()
    labels = torch.tensor(digits.CLASSES).repeat_interleave(PER_CLASS)
    f, images = labels == forget, drawn(model, labels)
    by_plain, by_reject = classify(plain, images), classify(reject, images)
    asked = labels[f]

    def p_f(m: Any) -> float:
        return probability(classify(reject, drawn(m, asked)), forget)

    row: dict[str, float | None] = {
        "p_f_reject": probability(by_reject[f], forget),
        "p_f": probability(by_plain[f], forget),
        "ra_reject": accuracy(by_reject[~f], labels[~f]),
        "ra": accuracy(by_plain[~f], labels[~f]),
    }
    # no scheduler: the attacks use the model's own loss
    row |= inversion(model, model.embedding, real, None, p_f, at=AT, loss=loss)
    again = relearn_steps(
        model, real, forget, None, p_f, every=1, max_steps=RELEARN, lr=learning_rate, loss=loss
    )
    row["relearn_steps"] = again["within"] if again["reached"] else None
    return row


def compare(
    args: argparse.Namespace,
    train: Callable[[Tensor, Tensor, argparse.Namespace], nn.Module],
    unlearn: Callable[[nn.Module, str, argparse.Namespace], EBUOptimizer],
    loss: Loss,
    protocol: dict[str, str],
) -> None:
    """Train, forget with the plain sum and with EBU, measure, and write the folder `--output_dir`.

    "never saw it" is the same training without the digit. What an attack reaches in that model is
    not a remainder of forgetting.
    """
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    x, y, _, _ = digits.images()
    other = y != args.forget
    models: dict[str, nn.Module] = {}
    settings: dict[str, Any] = {}

    def timed(name: str, make: Callable[[], nn.Module]) -> None:
        begin = time.perf_counter()
        models[name] = make().eval()
        seconds[name] = time.perf_counter() - begin

    def unlearned(rule: str) -> nn.Module:
        model = copy.deepcopy(models["before"])
        optimizer = unlearn(model, rule, args)
        if rule == "EBU":
            settings.update((n, getattr(optimizer, n)) for n in SETTINGS)
        return model

    with replacing_folder(args.output_dir) as work:
        timed("before", lambda: train(x, y, args))
        timed("plain sum", lambda: unlearned("plain sum"))
        timed("EBU", lambda: unlearned("EBU"))
        timed("never saw it", lambda: train(x[other], y[other], args))
        rows = {
            name: measure(model, args.forget, x[~other], loss, args.learning_rate)
            for name, model in models.items()
        }
        noise = surrogate_noise(
            "uniform", (2000, *digits.SHAPE), generator=torch.Generator().manual_seed(0)
        )
        plain, reject = digits.load_classifiers()
        rows["noise"] = {
            "p_f_reject": probability(classify(reject, noise), args.forget),
            "p_f": probability(classify(plain, noise), args.forget),
        }
        seconds["all"] = time.perf_counter() - start
        results = {
            "script": args.script,
            "rows": rows,
            "protocol": {
                "forget": args.forget,
                "steps": args.steps,
                "train_steps": args.train_steps,
                "batch_size": args.batch_size,
                "optimizer": "Adam",
                "learning_rate": args.learning_rate,
                **protocol,
                **settings,
                "images_per_class": PER_CLASS,
                "classifiers": "ten classes and eleven; the last one of eleven is noise",
                "inversion": "a new condition vector from the mean of all, Adam 0.1, batch 32",
                "relearn_steps": f"all weights, Adam {args.learning_rate:g}, batch 32, measured "
                f"at every step until P_f >= 0.5; null: not within {RELEARN}",
            },
            "seeds": {"training and unlearning": args.seed, "evaluation": 1, "attacks": 0},
            "seconds": seconds,
            "versions": versions(),
        }
        grid(models, args.forget, work / "before_after.png")
        save_file(models["EBU"].state_dict(), work / "model.safetensors")
        (work / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\n{table(rows)}\n")
    print(
        f"in {seconds['all']:.0f} s, of which the base model {seconds['before']:.0f} and EBU "
        f"{seconds['EBU']:.1f}; see {args.output_dir}/"
    )


ROWS = (
    ("forgotten", "p_f_reject", "P of the forgotten digit (reject class)"),
    ("forgotten", "p_f", "the same, ten-class classifier"),
    ("kept", "ra_reject", "accuracy on the nine kept (reject class)"),
    ("kept", "ra", "the same, ten-class classifier"),
    *(("deep", f"inversion_{n}", f"P after a new condition, {n} steps") for n in AT),
    ("deep", "relearn_steps", "steps of relearning until P is 0.5"),
)


def table(rows: dict[str, dict[str, float | None]]) -> str:
    lines = [f"{'axis':<10} {'':<40}" + "".join(f" {name:>12}" for name in rows)]
    for axis, key, text in ROWS:
        cells = "".join(f" {cell(row, key):>12}" for row in rows.values())
        lines.append(f"{axis:<10} {text:<40}{cells}")
    return "\n".join(lines)


def cell(row: dict[str, float | None], key: str) -> str:
    if key not in row:
        return ""
    value = row[key]
    if key == "relearn_steps":
        return f"> {RELEARN}" if value is None else f"{value:.0f}"
    return f"{value:.3f}"


def grid(models: dict[str, nn.Module], forget: int, path: Path) -> None:
    """One panel per model, one row per digit, eight images from the same random numbers."""
    labels = torch.tensor(digits.CLASSES).repeat_interleave(8)
    fig, axes = plt.subplots(
        1, len(models), figsize=(2.1 * len(models) + 0.3, 2.95), layout="constrained"
    )
    for ax, (name, model) in zip(axes, models.items()):
        sheet = torch.ones(10 * 9 - 1, 8 * 9 - 1)  # white lines, one pixel wide
        for i, image in enumerate(drawn(model, labels)[:, 0]):
            top, left = i // 8 * 9, i % 8 * 9
            sheet[top : top + 8, left : left + 8] = image
        ax.imshow(sheet, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(name, fontsize=11)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_yticks([9 * c + 3.5 for c in digits.CLASSES], digits.CLASSES)
    axes[0].tick_params(length=0)
    axes[0].get_yticklabels()[forget].set_color("tab:red")
    fig.savefig(path, dpi=100)
    plt.close(fig)
