"""Textual inversion: a new word, learned on images of the target with the frozen model; also with
the settings of "Circumventing Concept Erasure" (CCE, Pham et al., 2023)."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..metrics.depth import Optimized, condition_replaced, learn_embeddings
from .found import Found, mean
from .model import NewWord, initial_words

if TYPE_CHECKING:
    from .attacks import Attack

AT = (100, 200)  # steps of inversion that are reported
#: CCE's settings (its esd/train.sh): 25 images, batches of 4 accumulated over 4 steps, the learning
#: rate 5e-3 multiplied by both, AdamW. Half of the images are mirrored, except for digits.
CCE_IMAGES, CCE_BATCH, CCE_RATE, CCE_DECAY, CCE_STEPS, CCE_START = 25, 16, 0.08, 0.01, 5000, "art"


def inversion(attack: Attack) -> Found:
    """Textual inversion from each start with each learning rate.

    The run with the highest P_f at the end counts. A single random start often ends at a neighbour
    of the concept, even on models that never forgot."""
    args, model = attack.args, attack.model
    at = sorted({s for s in AT if s < args.inversion_steps} | {args.inversion_steps})
    runs = []
    begin = initial_words(model, args.initializer_token, args.seed)
    for (start, initial), rate in product(begin.items(), args.inversion_learning_rates):
        vectors, losses = learn(attack, initial, rate, at)
        looks = {steps: look(attack, vector) for steps, vector in vectors.items()}
        told = {
            "start": start,
            "learning_rate": rate,
            "p_f": {steps: score["value"] for steps, (score, _) in looks.items()},
            "loss_first_20": mean(losses[:20]),
            "loss_last_20": mean(losses[-20:]),
        }
        runs.append((told, vectors, looks))
    best, vectors, looks = max(runs, key=lambda run: run[0]["p_f"][at[-1]])
    said = {
        "start": best["start"],
        "learning_rate": best["learning_rate"],
        "runs": [told for told, _, _ in runs],
    }
    return Found(
        {f"inversion_{s}": looks[s][0] for s in at},
        said,
        {"word": vectors[at[-1]], f"pictures inversion_{at[-1]}": looks[at[-1]][1]},
    )


def cce(attack: Attack) -> Found:
    """CCE: one vector, learned with CCE's optimizer on 25 images of the base.

    It starts at the word "art", or at random if that is not one token. The templates are those of
    the forgotten prompts."""
    args, model = attack.args, attack.model
    target = attack.looks["target"].tensors
    latents, numbers = target["latents"][:CCE_IMAGES], target["prompts"][:CCE_IMAGES]
    mirrored = args.judge != "world"
    if mirrored:
        pictures = attack.base.pictures(latents).flip(-1)
        flipped = attack.base.family.to_latents(attack.base.vae, pictures)
        latents, numbers = torch.cat([latents, flipped]), torch.cat([numbers, numbers])
    try:
        start, initial = CCE_START, initial_words(model, [CCE_START], args.seed)[CCE_START]
    except InputError:
        start, initial = "random", initial_words(model, [], args.seed)["random"]

    def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=CCE_RATE, weight_decay=CCE_DECAY)

    vectors, losses = learn(
        attack, initial, CCE_RATE, [args.cce_steps], (latents, numbers), CCE_BATCH, adamw
    )
    score, shown = look(attack, vectors[args.cce_steps])
    said = {
        "start": start,
        "steps": args.cce_steps,
        "published_steps": CCE_STEPS,
        "images": len(target["latents"][:CCE_IMAGES]),
        "mirrored": mirrored,
        "loss_first_20": mean(losses[:20]),
        "loss_last_20": mean(losses[-20:]),
    }
    return Found({"cce": score}, said, {"pictures cce": shown})


def look(attack: Attack, vector: Tensor) -> tuple[dict, Tensor]:
    """P_f and images of the prompts with `vector` in the word's place."""
    asked = NewWord(attack.model, [x.template for x in attack.asked], vector)
    with condition_replaced(asked.word, vector), torch.no_grad():
        embeddings = asked.embeddings(torch.arange(len(attack.asked)))
    return attack.look(attack.model, embeddings)


def learn(
    attack: Attack,
    initial: Tensor,
    rate: float,
    at: list[int],
    target: tuple[Tensor, Tensor] | None = None,
    batch: int | None = None,
    optimizer: Optimized | None = None,
) -> tuple[dict[int, Tensor], list[float]]:
    """Learn a word: returns the word after each of the steps `at`, and the loss of every step.

    Args:
        target: latents and the numbers of their prompts; None: those of the attack.
    """
    args, losses = attack.args, []
    word = NewWord(attack.model, [x.template for x in attack.drawn], initial)
    found = attack.looks["target"].tensors
    latents, numbers = (found["latents"], found["prompts"]) if target is None else target

    def loss(_: Any, rows: Tensor, _labels: Tensor, g: torch.Generator) -> Tensor:
        chosen = rows.flatten().cpu()
        condition = attack.model.told(word.embeddings(numbers[chosen]))
        value = attack.denoise(word.unet, latents[chosen].to(attack.model.device), condition, g)
        losses.append(value.item())
        bar.update()
        return value

    with tqdm(total=at[-1], desc=f"inversion, learning rate {rate:g}") as bar:
        vectors = learn_embeddings(
            word,
            word.word,
            torch.arange(len(latents)).view(-1, 1, 1, 1),
            None,
            at=at,
            lr=rate,
            batch_size=batch or args.train_batch_size,
            seed=args.seed,
            loss=loss,
            optimizer=optimizer,
        )
    return vectors, losses
