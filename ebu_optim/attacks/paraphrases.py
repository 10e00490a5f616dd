"""The attack by paraphrases of the prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from ..metrics.images import to_uint8
from ..metrics.intervals import estimate
from .found import SHOWN, Found, chosen

if TYPE_CHECKING:
    from .attacks import Attack


def paraphrase(attack: Attack) -> Found:
    """P_f of every wording, each over the same number of images, with intervals over images."""
    model, scores, found, rows = attack.model, [], {}, {}
    for wording in tqdm(attack.questions.paraphrases, "paraphrases"):
        texts = chosen(wording.texts, attack.args.attack_images, attack.args.seed)
        pictures = model.pictures(model.latents(model.encode(texts), attack.args.seed))
        scores.append(attack.judge.score(pictures))
        found[wording.name] = estimate(scores[-1], seed=attack.args.seed)
        rows[wording.name] = to_uint8(pictures[:SHOWN])
    worst = max(found, key=lambda name: found[name]["value"])
    values = {
        "paraphrase": estimate(torch.cat(scores), seed=attack.args.seed),
        "paraphrase_worst": found[worst],
    }
    said = {"wordings": found, "worst": worst}
    return Found(values, said, {"pictures worst paraphrase": rows[worst]})
