"""Rules compared on a language model: 8 of 80 invented people are forgotten, 18 are replayed.

A base model is trained for each seed, and one that never saw the 8 people. A run forgets them by a
loss and a rule, and is measured every few steps. Of these points the one is taken at which most of
the held-out people's answers is left, among those at which at most `LEFT` of the probability of the
forgotten answers is. There it is measured on what took no part in a choice: the people that were
never replayed, all questions in another wording, and relearning: the model is fine-tuned on half of
the forgotten facts, and measured on the other half. Strengths and learning rates are chosen on seed
100 by the held-out people, twelve trials a rule, for every loss anew. One JSON file a run; a second
start only runs what is missing.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from ..baselines import methods
from ..files import load_tensors, replacing, save_tensors
from ..language import answer_nll, ascent_loss, npo_loss
from ..worlds.people import People, collate, drawn, new_model
from ..worlds.people_judged import PARTS, evaluated, measure, train

STEPS, CHECK, BATCH, CLIP = 200, 10, 16, 1.0
LEFT = 0.05  # twice what guessing among the answers of a kind reaches
TUNE_SEED, SEEDS = 100, (1, 2, 3, 4, 5)
RATES = (1e-4, 3e-4, 1e-3)
#: Loss -> its title.
LOSSES = {"npo": "NPO", "idk": "I don't know", "ascent": "gradient ascent"}
#: What the rules stand beside.
GROUND = {"base": "before", "never_saw": "never saw them"}
#: Rule -> the options that are its own, and what is tuned: four values, with each learning rate.
UNIT = {"fisher": "online", "fisher_scale": "unit"}
RULES: Mapping[str, tuple[Mapping[str, Any], str, tuple[float, ...]]] = {
    "joint": ({}, "forget_weight", (0.0625, 0.25, 1.0, 4.0)),
    "pcgrad": ({}, "forget_weight", (0.0625, 0.25, 1.0, 4.0)),
    "sago": ({}, "remember_weight", (0.25, 1.0, 4.0, 16.0)),
    "selective_amnesia": (UNIT, "lam", (100.0, 1000.0, 1e4, 1e5)),
    "ebu_routed": (UNIT, "gamma", (10.0, 100.0, 1000.0, 1e4)),
    "ebu_added": (UNIT, "gamma", (10.0, 100.0, 1000.0, 1e4)),
}


def choices(rule: str) -> list[dict[str, float]]:
    """The trials of a rule."""
    _, option, values = RULES[rule]
    return [{"learning_rate": rate, option: value} for value in values for rate in RATES]


def pretrained(people: People, seed: int, folder: Path, *, without: bool = False) -> Any:
    """The base model of a seed, trained once; `without`: on all but the people to forget."""
    model = new_model(people, seed)
    file = folder / f"{'never_saw' if without else 'base'}-s{seed}.safetensors"
    if file.exists():
        tensors, _ = load_tensors(file)
        model.load_state_dict(tensors, strict=False)  # the head's weights are the embedding's
        return model
    train(model, people, PARTS[1:] if without else PARTS, seed)
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_tensors(file, tensors, {"seed": seed})
    return model


def prepare(seeds: Sequence[int], folder: Path) -> None:
    """Train the base models before runs that share them."""
    for seed in (TUNE_SEED, *seeds):
        pretrained(People(seed), seed, folder)


def forget_batch(people: People, loss: str, frozen: Any) -> dict[str, Tensor]:
    """What the forget loss learns from; with the frozen model's nll of each answer."""
    facts = people.of("forgotten")
    batch = collate(people.ignorance(facts) if loss == "idk" else people.improbable(facts))
    with torch.no_grad():
        logits = frozen(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return {**batch, "reference": answer_nll(logits, batch["labels"])[0]}


def forget_loss(model: Any, batch: Mapping[str, Tensor], loss: str) -> Tensor:
    labels, reference = batch["labels"], batch["reference"]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if loss == "npo":
        return npo_loss(logits, labels, reference)
    nll, lengths = answer_nll(logits, labels)
    return nll.sum() / lengths.sum() if loss == "idk" else ascent_loss(logits, labels)


def unlearn(spec: Mapping[str, Any], model: Any, people: People) -> list[dict[str, Any]]:
    """Forget: the trace of it. The model is left at the best point of it, or where none has
    forgotten at its end."""
    fixed, option, _ = RULES[spec["rule"]]
    opt = methods[spec["rule"]].build(
        Adam(model.parameters(), lr=spec["learning_rate"]),
        max_grad_norm=CLIP,
        **fixed,
        **{option: spec[option]},
    )
    frozen, g = copy.deepcopy(model), torch.Generator().manual_seed(1000 + spec["seed"])
    to_forget = forget_batch(people, spec["loss"], frozen)
    to_keep = collate(people.examples(people.of("replayed")))
    trace, best = [], None
    for step in range(1, STEPS + 1):
        with opt.forget():
            forget_loss(model, drawn(to_forget, BATCH, g), spec["loss"]).backward()
        with opt.remember():
            model(**drawn(to_keep, BATCH, g)).loss.backward()
        opt.step()
        if step % CHECK:
            continue
        parts = PARTS[::2] if spec["trial"] else PARTS
        left = {p: measure(model, people, people.of(p))["probability"] for p in parts}
        trace.append({"step": step, **left})
        if trace[-1] is point(trace):
            best = copy.deepcopy(model.state_dict())
    if best is not None:
        model.load_state_dict(best)
    opt.zero_grad()
    return trace


def point(trace: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The point of a trace that is taken; None where it never forgets."""
    forgotten = [at for at in trace if at["forgotten"] <= LEFT]
    return max(forgotten, key=lambda at: at["held_out"], default=None)


def run(spec: Mapping[str, Any], folder: Path) -> None:
    """One run, from the base model of its seed to its JSON file."""
    torch.set_num_threads(1)
    people = People(spec["seed"])
    model = pretrained(people, spec["seed"], folder, without=spec["rule"] == "never_saw").train()
    start = time.perf_counter()
    result: dict[str, Any] = {"spec": dict(spec)}
    if spec["rule"] in RULES:
        result["trace"] = unlearn(spec, model, people)
        result["point"] = point(result["trace"])
    if not spec["trial"]:
        result |= evaluated(model, people, spec["seed"])
    result["seconds"] = time.perf_counter() - start
    with replacing(folder / "runs" / f"{name(spec)}.json") as path:
        path.write_text(json.dumps(result, indent=1))


def name(spec: Mapping[str, Any]) -> str:
    """That of a run's file: every option that makes it what it is."""
    if spec["rule"] not in RULES:
        return f"{spec['rule']}-s{spec['seed']}"
    option = RULES[spec["rule"]][1]
    strength = f"lr{spec['learning_rate']:g}-{option}{spec[option]:g}"
    kind = "trial-" if spec["trial"] else ""
    return f"{kind}{spec['loss']}-{spec['rule']}-{strength}-s{spec['seed']}"


def trials(losses: Sequence[str], rules: Sequence[str]) -> list[dict[str, Any]]:
    """What strengths are chosen from."""
    return [
        {"loss": loss, "rule": rule, "seed": TUNE_SEED, "trial": True, **choice}
        for loss in losses
        for rule in rules
        for choice in choices(rule)
    ]


def score(result: Mapping[str, Any]) -> float:
    """What is left of the held-out people at the point that is taken; below 0 for a trial that did
    not forget."""
    if result["point"] is None:
        return -min(at["forgotten"] for at in result["trace"])
    return result["point"]["held_out"]


def chosen(results: Sequence[Mapping[str, Any]], loss: str, rule: str) -> dict[str, Any] | None:
    """The best trial's choice; None before all of them are there."""
    found = [
        r
        for r in results
        if r["spec"]["trial"] and (r["spec"]["loss"], r["spec"]["rule"]) == (loss, rule)
    ]
    if len(found) < len(choices(rule)):
        return None
    best = max(found, key=score)["spec"]
    return {key: best[key] for key in ("learning_rate", RULES[rule][1])}


def reported(
    results: Sequence[Mapping[str, Any]],
    losses: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """The runs that are reported, with the strengths chosen, a seed after the other."""
    picked = {(lo, ru): c for lo in losses for ru in rules if (c := chosen(results, lo, ru))}
    ground = [{"rule": rule, "seed": seed, "trial": False} for seed in seeds for rule in GROUND]
    return ground + [
        {"loss": loss, "rule": rule, "seed": seed, "trial": False, **choice}
        for seed in seeds
        for (loss, rule), choice in picked.items()
    ]


def current(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All but the runs whose strengths are an earlier choice's, made from fewer trials."""

    def chosen_now(spec: Mapping[str, Any]) -> bool:
        if spec["trial"] or spec["rule"] not in RULES:
            return True
        now = chosen(results, spec["loss"], spec["rule"])
        return now is None or now.items() <= spec.items()

    return [r for r in results if chosen_now(r["spec"])]


def forgot(result: Mapping[str, Any]) -> bool:
    """Whether a point of it has forgotten; the base models have none."""
    return result.get("point", True) is not None


#: Title of a column -> what it shows of a result.
COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "forgotten ↓": lambda r: r["forgotten"][0]["probability"],
    "other wording ↓": lambda r: r["forgotten"][1]["probability"],
    "truth ratio": lambda r: r["forgotten"][0]["ratio_forgotten"],
    "replayed ↑": lambda r: r["replayed"][0]["probability"],
    "never replayed ↑": lambda r: r["never_replayed"][0]["probability"],
    "their accuracy ↑": lambda r: r["never_replayed"][0]["accuracy"],
    "back after relearning ↓": lambda r: r["relearning"]["back"],
}


def table(results: Sequence[Mapping[str, Any]], loss: str) -> str:
    """A row for each rule, the mean over seeds ± their standard deviation."""
    lines = [
        f"| rule | chosen | seeds that forgot | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (3 + len(COLUMNS))}",
    ]
    shown = [r for r in results if not r["spec"]["trial"]]
    for rule in (*GROUND, *RULES):
        of_rule = [r for r in shown if r["spec"]["rule"] == rule]
        members = [r for r in of_rule if r["spec"].get("loss", loss) == loss]
        if not members:
            continue
        cells = [cell([column(r) for r in members]) for column in COLUMNS.values()]
        title = GROUND[rule] if rule in GROUND else methods[rule].title
        count = f"{sum(map(forgot, members))} of {len(members)}" if rule in RULES else ""
        picked = choice_said(members[0]["spec"]) if rule in RULES else ""
        lines.append(f"| {title} | {picked} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def choice_said(spec: Mapping[str, Any]) -> str:
    option = RULES[spec["rule"]][1]
    return f"{option} {spec[option]:g}, rate {spec['learning_rate']:g}"


def cell(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """A table for each loss of which there are runs."""
    made = {r["spec"]["loss"] for r in results if not r["spec"]["trial"] and "loss" in r["spec"]}
    return "\n".join(f"### {LOSSES[x]}\n\n{table(results, x)}" for x in LOSSES if x in made)
