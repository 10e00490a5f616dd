"""The cost of depth: rules with and without adversarial embeddings and a relearner, on digits.

Every run forgets "0" from the quickstart's model, by relabelling with a frozen teacher and crossed
distillation. The measures are those of the quickstart: P_f by the classifier with a reject class,
accuracy on the other digits (RA), and two attacks. Inversion learns a new embedding with frozen
weights, at the learning rate of the adversaries and at two others; the best of the three is
reported, too. Relearning counts steps of fine-tuning. Each run has one JSON file, and a second
start only makes the missing runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from ..baselines import SalUn, methods
from ..diffusion import (
    Adversary,
    Relearner,
    denoising_loss,
    distillation_loss,
    evaluating,
    next_class,
    relabel_loss,
    sample_set,
)
from ..files import replacing
from ..metrics import classify, probability
from ..metrics.intervals import mean_said, t_interval
from ..metrics.inversion import inversion
from ..metrics.relearn_steps import relearn_steps
from ..worlds import digits
from ..worlds.digits_judged import PER_CLASS, Evaluation

FORGET, STEPS, BATCH, RATE, CLIP = 0, 200, 16, 3e-4, 1.0
KEPT = [c for c in digits.CLASSES if c != FORGET]
RATES = (0.1, 0.03, 0.3)  # learning rates of inversion; the first one is also the adversaries'
INVERSION_STEPS, RELEARN_MAX = 200, 100

#: What makes a run deep: options of `Adversary` and of `Relearner`. A "light" forget loss is a mean
#: over pixels where the remember loss is a sum: a 64th of its weight.
DEPTHS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "adversary": {"adversary": {"steps": 3, "restart": 20}},
    "adversary-1": {"adversary": {"steps": 1, "restart": 60}},
    "relearner": {"relearner": {"steps": 3, "lr": 3e-4}},
    "both": {
        "adversary": {"steps": 3, "restart": 20},
        "relearner": {"steps": 3, "lr": 3e-4},
    },
    "adversary-mean": {"adversary": {"steps": 3, "restart": 20}, "start": "mean"},
    "adversary-tenth": {"adversary": {"steps": 3, "restart": 20}, "weight": 0.1},
    "light": {"reduction": "mean"},
    "light-adversary": {"adversary": {"steps": 3, "restart": 20}, "reduction": "mean"},
    "light-relearner": {"relearner": {"steps": 3, "lr": 3e-4}, "reduction": "mean"},
}
TITLES = {
    "none": "as it is",
    "adversary": "adversary, 3 steps",
    "adversary-1": "adversary, 1 step",
    "relearner": "relearner",
    "both": "adversary and relearner",
    "adversary-mean": "adversary from the rows' mean",
    "light": "light",
    "adversary-tenth": "adversary at a tenth of the weight",
    "light-adversary": "light, adversary, 3 steps",
    "light-relearner": "light, relearner",
}
COLUMNS = {
    "p_f": "P_f ↓",
    "ra": "RA ↑",
    "inversion": "inversion 200 ↓",
    "worst": "worst of 3 rates ↓",
    "relearn_steps": "relearn_steps ↑",
    "passes": "passes a step",
}


def passes(depth: str) -> int:
    """Forward and backward passes of a batch in one step, without those that compute targets."""
    how, count = DEPTHS[depth], 2
    if attack := how.get("adversary"):
        count += 1 + attack["steps"]
    if relearner := how.get("relearner"):
        count += 1 + relearner["steps"]
    return count


def unlearn(rule: str, depth: str, seed: int, folder: Path) -> tuple[Any, dict[str, float]]:
    """The unlearned model, and the seconds of its steps."""
    torch.manual_seed(seed)
    how, g, scheduler = (
        DEPTHS[depth],
        torch.Generator().manual_seed(1000 + seed),
        digits.scheduler(),
    )
    model, teacher = digits.load_unet().train(), digits.load_unet().eval()
    kept = torch.tensor(KEPT)
    images, labels = prepare(folder)
    x, y, _, _ = digits.images()
    real, asked = x[y == FORGET], torch.full((BATCH,), FORGET)
    other = next_class(asked, len(digits.CLASSES), forgotten=[FORGET])
    opt = methods[rule].build(Adam(model.parameters(), lr=RATE), max_grad_norm=CLIP)
    embedding = model.class_embedding
    adversary, relearner = None, None
    if "relearner" in how:
        relearner = Relearner(model.parameters(), **how["relearner"])
    if "adversary" in how:
        start = None
        if how.get("start") == "mean":
            start = embedding.weight.detach().mean(0).expand(STEPS, -1)
        adversary = Adversary(
            embedding, [FORGET], seed=seed, lr=RATES[0], start=start, **how["adversary"]
        )

    def drawing(generator: torch.Generator) -> Tensor:
        """The loss that both attackers minimise."""
        i = torch.randint(len(real), (BATCH,), generator=generator)
        with evaluating(model):
            return denoising_loss(model, real[i], asked, scheduler, generator=generator)

    def relabel() -> Tensor:
        i = torch.randint(len(real), (BATCH,), generator=g)
        return relabel_loss(
            model,
            real[i],
            asked,
            other,
            scheduler,
            teacher=teacher,
            generator=g,
            reduction=how.get("reduction", "sum"),
        )

    if isinstance(opt, SalUn):
        opt.make_mask([lambda: drawing(g).backward() for _ in range(len(real) // BATCH)])
    start = time.perf_counter()
    for _ in range(STEPS):
        if adversary:
            adversary.step(lambda _label, generator: drawing(generator))
        with opt.forget():
            relabel().backward()
            if adversary:
                with adversary.at():
                    (relabel() * how.get("weight", 1.0)).backward()
            if relearner:
                with relearner.moved(partial(drawing, g)):
                    relabel().backward()
        with opt.remember():
            i = torch.randint(len(images), (BATCH,), generator=g)
            distillation_loss(
                model, teacher, images[i], labels[i], scheduler, crossed=kept, generator=g
            ).backward()
        opt.step()
    return model.eval(), {"seconds": time.perf_counter() - start}


def prepare(folder: Path) -> tuple[Tensor, Tensor]:
    """30 images of each kept class with their labels, generated once for all runs."""
    return sample_set(
        folder / "replay.safetensors",
        digits.load_unet().eval(),
        Evaluation(FORGET, "cpu").ddim,
        torch.tensor(KEPT).repeat_interleave(30),
        digits.SHAPE,
        num_inference_steps=20,
        batch_size=90,
    )


def measure(model: Any) -> dict[str, Any]:
    """Measure a model on the three axes."""
    judge, scheduler = Evaluation(FORGET, "cpu"), digits.scheduler()
    labels = torch.tensor(digits.CLASSES).repeat_interleave(PER_CLASS)
    found = judge.measure(judge.draw(model, labels, seed=1), labels)
    x, y, _, _ = digits.images()
    real, asked = x[y == FORGET], torch.full((PER_CLASS,), FORGET)

    def p_f(attacked: Any) -> float:
        return probability(classify(judge.reject, judge.draw(attacked, asked, seed=3)), FORGET)

    at = f"inversion_{INVERSION_STEPS}"
    inverted = [
        inversion(
            model, model.class_embedding, real, scheduler, p_f, at=[INVERSION_STEPS], lr=rate
        )[at]
        for rate in RATES
    ]
    again = relearn_steps(model, real, FORGET, scheduler, p_f, max_steps=RELEARN_MAX)
    return {
        "p_f": found["p_f_reject"],
        "ra": found["ra"],
        "inversion": inverted[0],
        "worst": max(inverted),
        "inversion_at_rates": dict(zip(map(str, RATES), inverted)),
        "relearn_steps": again["steps"],
        "relearn_curve": again["curve"],
    }


def run(spec: Mapping[str, Any], folder: Path) -> None:
    """Make one run, from the pretrained model to its JSON file."""
    torch.set_num_threads(1)
    model, took = unlearn(spec["rule"], spec["depth"], spec["seed"], folder)
    result = {"spec": dict(spec), **measure(model), **took, "passes": passes(spec["depth"])}
    with replacing(folder / "runs" / f"{name(spec)}.json") as path:
        path.write_text(json.dumps(result, indent=1))


def name(spec: Mapping[str, Any]) -> str:
    return f"{spec['rule']}-{spec['depth']}-s{spec['seed']}"


def specs(rules: Sequence[str], depths: Sequence[str], seeds: Sequence[int]) -> list[dict]:
    """All runs, ordered by seed, so that early results can be compared."""
    return [{"rule": r, "depth": d, "seed": s} for s in seeds for d in depths for r in rules]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A table with one row per rule and depth: the mean over seeds ± half its 95 % interval."""
    lines = [
        f"| rule | depth | seeds | {' | '.join(COLUMNS.values())} |",
        f"|{'---|' * (3 + len(COLUMNS))}",
    ]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["spec"]["rule"], r["spec"]["depth"]), []).append(r)
    order = list(DEPTHS)
    for rule, depth in sorted(groups, key=lambda k: (list(methods).index(k[0]), order.index(k[1]))):
        members = groups[rule, depth]
        cells = [cell(column, [m[column] for m in members]) for column in COLUMNS]
        lines.append(
            f"| {methods[rule].title} | {TITLES[depth]} | {len(members)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


#: Pairs of depths that are compared seed by seed.
PAIRS = [("adversary-tenth", "none"), ("relearner", "none"), ("light-adversary", "light")]


def differences(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per rule and pair of depths: the mean of the differences over seeds, with its 95 %
    interval."""
    at = {(r["spec"]["rule"], r["spec"]["depth"], r["spec"]["seed"]): r for r in results}
    lines = []
    for rule in [m for m in methods if any(m == key[0] for key in at)]:
        for deep, plain in PAIRS:
            seeds = [s for r, d, s in at if (r, d) == (rule, deep) and (rule, plain, s) in at]
            if len(seeds) < 2:
                continue
            said = []
            for column in ("ra", "inversion", "worst", "relearn_steps"):
                found = [
                    _known(at[rule, deep, s][column]) - _known(at[rule, plain, s][column])
                    for s in seeds
                ]
                low, high = t_interval(found)
                title = COLUMNS[column][:-2]
                said.append(f"{title} {statistics.fmean(found):+.3f} [{low:+.3f}, {high:+.3f}]")
            pair = f"{TITLES[deep]} minus {TITLES[plain]} ({len(seeds)} seeds)"
            lines.append(f"- {methods[rule].title}, {pair}: {', '.join(said)}")
    return "\n".join(lines) + "\n"


def _known(value: float | None) -> float:
    return RELEARN_MAX if value is None else value


def cell(column: str, values: Sequence[float | None]) -> str:
    """A cell of the table. Runs that were not relearned count with the maximal number of steps."""
    if column == "passes":
        return f"{values[0]}"
    digits_of = {"relearn_steps": 1}.get(column, 3)
    there = [_known(v) for v in values]
    more = "> " if None in values else ""
    return more + mean_said(there, digits_of)
