"""Teaching a model the invented people, and how much of them it says: forgotten, kept, deep."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Adam

from ..language import truth_ratio
from .people import Fact, People, collate, drawn

TRAIN_STEPS, TRAIN_RATE, TRAIN_BATCH = 500, 3e-3, 64
RELEARN_STEPS, RELEARN_CHECK, RELEARN_RATE, RELEARN_BATCH = 60, 10, 3e-4, 16
PARTS = ("forgotten", "replayed", "held_out", "never_replayed")


def train(model: Any, people: People, parts: Sequence[str], seed: int) -> None:
    """Teach a model the facts of these parts, in both wordings."""
    known = collate(people.examples([f for part in parts for f in people.of(part)], (0, 1)))
    g = torch.Generator().manual_seed(seed)
    optimizer = Adam(model.parameters(), lr=TRAIN_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TRAIN_RATE, TRAIN_STEPS, pct_start=0.1
    )
    for _ in range(TRAIN_STEPS):
        optimizer.zero_grad()
        model(**drawn(known, TRAIN_BATCH, g)).loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


@torch.no_grad()
def log_probabilities(model: Any, people: People, facts: Sequence[Fact], wording: int) -> Tensor:
    """Logarithm of the probability of every word as the answer's first, (facts, vocabulary)."""
    was, device = model.training, model.device
    model.eval()
    batch = collate([people.example(f.questions[wording], f.answer, end=False) for f in facts])
    last = batch["attention_mask"].sum(1) - 2  # it predicts the answer
    logits = model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}).logits
    model.train(was)
    return F.log_softmax(logits[torch.arange(len(facts)), last].float(), -1).cpu()


def measure(
    model: Any, people: People, facts: Sequence[Fact], wording: int = 0
) -> dict[str, float]:
    """Means over facts: probability of the answer, whether it is the most probable word, and the
    truth ratio as it is reported for what is forgotten ("ratio_forgotten": min(R, 1/R)) and for
    what is kept ("ratio_kept": max(0, 1 - R))."""
    found = log_probabilities(model, people, facts, wording)
    right = torch.tensor([people.words[f.answer] for f in facts])
    wrong = torch.tensor([[people.words[w] for w in f.wrong] for f in facts])
    p = found.gather(1, right[:, None])[:, 0]
    ratio = truth_ratio(found.gather(1, wrong).exp().double(), p.exp().double())
    return {
        "probability": float(p.exp().mean()),
        "accuracy": float((found.argmax(1) == right).float().mean()),
        "ratio_forgotten": float(torch.minimum(ratio, 1 / ratio).mean()),
        "ratio_kept": float((1 - ratio).clamp(min=0).mean()),
    }


def relearned(model: Any, people: People, seed: int) -> dict[str, Any]:
    """Fine-tune a copy on half of the forgotten facts, sampled with the seed: the probability of
    the other half before and along the way, and the most that came back."""
    facts, g = people.of("forgotten"), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(facts), generator=g).tolist()
    half = len(facts) // 2
    shown, asked = ([facts[i] for i in part] for part in (order[:half], order[half:]))
    model, batch = copy.deepcopy(model), collate(people.examples(shown))
    optimizer = Adam(model.parameters(), lr=RELEARN_RATE)
    curve = [measure(model, people, asked)["probability"]]
    for step in range(1, RELEARN_STEPS + 1):
        optimizer.zero_grad()
        model(**drawn(batch, RELEARN_BATCH, g)).loss.backward()
        optimizer.step()
        if step % RELEARN_CHECK == 0:
            curve.append(measure(model, people, asked)["probability"])
    return {"curve": curve, "back": max(curve), "shown": measure(model, people, shown)}


def evaluated(model: Any, people: People, seed: int) -> dict[str, Any]:
    """Every part in both wordings, of which forgetting sees the first alone; and relearning."""
    found: dict[str, Any] = {
        part: [measure(model, people, people.of(part), wording) for wording in (0, 1)]
        for part in PARTS
    }
    return {**found, "relearning": relearned(model, people, seed)}
