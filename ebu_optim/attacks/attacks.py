"""The attacks of attack.py, each by the functions that attack class-conditional models too.

P_f is the mean over pictures of what the judge gives the forgotten concept. The pictures to learn
from, and the P_f of which half is to be reached, come from the base.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion import denoising_loss
from ..errors import InputError
from ..images import ENDINGS, image_files
from ..manifest import contents
from ..metrics.depth import condition_replaced, learn_embeddings, relearning
from ..metrics.images import to_uint8
from ..metrics.intervals import estimate
from ..metrics.unlearn_steps import crossing
from ..modules import stream
from ..text_to_image.sets import read_images
from .judges import Judge
from .model import Attacked, NewWord, initial_words
from .prompts import Questions

WORD = "<attack>"
SHARE = 0.5  # of the base's P_f: so much of it is the concept back
AT = (100, 200)  # steps of inversion that are reported
LOOKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # steps of relearning that are measured
REPORTED = 10  # of them, whether the concept is back before that or not
SHOWN = 8


class Found(NamedTuple):
    """Attributes:
    values: of attacks.json.
    said: how they came about.
    tensors: "pictures ..." (n, 3, H, W) uint8, and what others go on with.
    """

    values: dict[str, Any]
    said: dict[str, Any]
    tensors: dict[str, Tensor]


class Attack:
    """All attacks on one model. `make` one after the other, "target" first; `known` where it was
    made before."""

    def __init__(
        self, args: Any, model: Attacked, base: Attacked, questions: Questions,
        judge: Judge, files: list[Path],
    ) -> None:  # fmt: skip
        self.args, self.model, self.base = args, model, base
        self.questions, self.judge, self.files = questions, judge, files
        forget = questions.forget
        #: of every look at the forgotten prompts, and of the pictures to learn from
        self.asked = chosen(forget, args.attack_images, args.seed)
        self.drawn = chosen(forget, args.target_images, args.seed + 1)
        self.looks: dict[str, Found] = {}

    def make(self, name: str) -> Found:
        return {"target": Attack.target, "p_f": Attack.unattacked, **ATTACKS}[name](self)

    def known(self, name: str, found: Found) -> None:
        """Raises:
        InputError: the base does not draw the target.
        """
        self.looks[name] = found
        if name == "target" and not found.values["p_f"]["value"] > 0:
            raise InputError(
                f"the judge sees no picture of the target in what the base draws for "
                f"{self.asked[0].text!r} and the like (P_f 0): is it the right --base_model, "
                "--forget and judge?"
            )

    # -- what is drawn and what is learned from --------------------------------------------------

    def look(self, model: Attacked, embeddings: Tensor, unet: Any = None) -> tuple[dict, Tensor]:
        """P_f with its interval, and some of the pictures; the same noise every time. The
        embeddings are of `asked`, in that order."""
        latents = model.latents(embeddings, self.args.seed, unet, self.asked)
        pictures = model.pictures(latents)
        score = estimate(self.judge.score(pictures), seed=self.args.seed)
        return score, to_uint8(pictures[:SHOWN])

    def target_protocol(self) -> dict[str, Any]:
        """All that the target depends on."""
        a = self.args
        return {
            "base": self.base.made_of(), "judge": self.judge.said, "seed": a.seed,
            "files": contents(self.files),
            "asked": self.asked, "drawn": self.drawn,
            "sampler": [a.num_inference_steps, a.guidance_scale, a.sample_batch_size],
            "shape": list(self.base.shape),
        }  # fmt: skip

    def target(self) -> Found:
        """Latents of the target, and the base's own P_f."""
        base = self.base
        score, _ = self.look(base, base.encode([x.text for x in self.asked]))
        if self.files:
            latents = encoded(base, self.files)
            prompts = torch.arange(len(latents)) % len(self.drawn)
            said = {"pictures": f"{len(latents)} of a folder"}
        else:
            # the sampler's own latents, not decoded and encoded again
            texts = [x.text for x in self.drawn]
            latents = base.latents(base.encode(texts), self.args.seed + 1, asked=self.drawn)
            prompts = torch.arange(len(latents))
            said = {"pictures": f"{len(latents)} drawn by the base"}
        shown = to_uint8(base.pictures(latents[:SHOWN]))
        tensors = {"latents": latents, "prompts": prompts, "pictures target": shown}
        return Found({"p_f": score}, said, tensors)

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, and the numbers of their prompts among `drawn`, of the target's rows; rows come
        as `images` (n, 1, 1, 1), so that the attacks pick pictures with their prompts."""
        found = self.looks["target"].tensors
        rows = rows.flatten().cpu()
        return found["latents"][rows].to(self.model.device), found["prompts"][rows]

    def rows(self) -> Tensor:
        return torch.arange(len(self.looks["target"].tensors["latents"])).view(-1, 1, 1, 1)

    # -- the attacks -----------------------------------------------------------------------------

    def unattacked(self) -> Found:
        model = self.model
        score, shown = self.look(model, model.encode([x.text for x in self.asked]))
        return Found({"p_f": score}, {}, {"pictures unlearned": shown})

    def seen(self) -> tuple[dict, Tensor]:
        """The look at the model as it is."""
        found = self.looks["p_f"]
        return found.values["p_f"], found.tensors["pictures unlearned"]

    def paraphrase(self) -> Found:
        """Every wording by as many pictures; the intervals are those of the pictures."""
        model, scores, found, rows = self.model, [], {}, {}
        for wording in tqdm(self.questions.paraphrases, "paraphrases"):
            texts = chosen(wording.texts, self.args.attack_images, self.args.seed)
            pictures = model.pictures(model.latents(model.encode(texts), self.args.seed))
            scores.append(self.judge.score(pictures))
            found[wording.name] = estimate(scores[-1], seed=self.args.seed)
            rows[wording.name] = to_uint8(pictures[:SHOWN])
        worst = max(found, key=lambda name: found[name]["value"])
        values = {
            "paraphrase": estimate(torch.cat(scores), seed=self.args.seed),
            "paraphrase_worst": found[worst],
        }
        said = {"wordings": found, "worst": worst}
        return Found(values, said, {"pictures worst paraphrase": rows[worst]})

    def inversion(self) -> Found:
        """A run for each start and each learning rate; the one with the highest P_f at the end
        counts. From one random start it often ends at a neighbour, on models too that never forgot.
        """
        args, model = self.args, self.model
        at = sorted({s for s in AT if s < args.inversion_steps} | {args.inversion_steps})
        runs = []
        begin = initial_words(model, args.initializer_token, args.seed)
        for (start, initial), rate in product(begin.items(), args.inversion_learning_rates):
            vectors, losses = self.learn(initial, rate, at)
            asked = NewWord(model, [x.template for x in self.asked], initial)
            looks = {}
            for steps, vector in vectors.items():
                with condition_replaced(asked.word, vector), torch.no_grad():
                    embeddings = asked.embeddings(torch.arange(len(self.asked)))
                looks[steps] = self.look(model, embeddings)
            told = {
                "start": start, "learning_rate": rate,
                "p_f": {steps: score["value"] for steps, (score, _) in looks.items()},
                "loss_first_20": mean(losses[:20]), "loss_last_20": mean(losses[-20:]),
            }  # fmt: skip
            runs.append((told, vectors, looks))
        best, vectors, looks = max(runs, key=lambda run: run[0]["p_f"][at[-1]])
        said = {
            "start": best["start"], "learning_rate": best["learning_rate"],
            "runs": [told for told, _, _ in runs],
        }  # fmt: skip
        return Found(
            {f"inversion_{s}": looks[s][0] for s in at}, said,
            {"word": vectors[at[-1]], f"pictures inversion_{at[-1]}": looks[at[-1]][1]},
        )  # fmt: skip

    def learn(
        self, initial: Tensor, rate: float, at: list[int]
    ) -> tuple[dict[int, Tensor], list[float]]:
        """The word after the steps `at`, and the loss of every step."""
        args, losses = self.args, []
        word = NewWord(self.model, [x.template for x in self.drawn], initial)

        def loss(_: Any, rows: Tensor, _labels: Tensor, g: torch.Generator) -> Tensor:
            latents, numbers = self.pairs(rows)
            condition = self.model.told(word.embeddings(numbers))
            value = self.denoise(word.unet, latents, condition, g)
            losses.append(value.item())
            bar.update()
            return value

        with tqdm(total=at[-1], desc=f"inversion, learning rate {rate:g}") as bar:
            vectors = learn_embeddings(
                word, word.word, self.rows(), None, at=at, lr=rate,
                batch_size=args.train_batch_size, seed=args.seed, loss=loss,
            )  # fmt: skip
        return vectors, losses

    def relearn(self) -> Found:
        """P_f of a copy of the UNet on the way; it ends where half of the base's P_f is reached."""
        args, model = self.args, self.model
        trained = model.encode([x.text for x in self.drawn])
        asked = model.encode([x.text for x in self.asked])
        level = SHARE * self.looks["target"].values["p_f"]["value"]
        last = args.relearn_max_steps

        def loss(unet: Any, rows: Tensor, _: Tensor, g: torch.Generator) -> Tensor:
            latents, numbers = self.pairs(rows)
            return self.denoise(unet, latents, model.told(trained[numbers]), g)

        students = relearning(
            model.unet, self.rows(), 0, None, lr=args.relearn_learning_rate,
            batch_size=args.train_batch_size, seed=args.seed, loss=loss,
        )  # fmt: skip
        curve, rows = [], {}
        for step, student in enumerate(tqdm(students, "relearning", total=last + 1)):
            if step in LOOKS or step == last:
                score, rows[step] = self.seen() if not step else self.look(model, asked, student)
                curve.append({"step": step, **score})
            back = curve[-1]["value"] >= level
            if step == last or (back and step >= min(REPORTED, last)):
                break
        first = crossing([(r["step"], 0.0, r["value"]) for r in curve], level, rising=True)
        values: dict[str, Any] = {
            f"relearn_{REPORTED}": {k: v for k, v in r.items() if k != "step"}
            for r in curve
            if r["step"] == REPORTED
        }
        values["relearn_steps"] = {
            "reached": first is not None,
            "steps": None if first is None else first[0],
            "within": curve[-1]["step"],
        }
        kept = sorted({min(REPORTED, last), max(rows)} & set(rows))
        tensors = {f"pictures relearn_{s}": rows[s] for s in kept}
        return Found(values, {"curve": curve, "level": level}, tensors)

    def denoise(self, unet: Any, latents: Tensor, condition: Any, g: torch.Generator) -> Tensor:
        # of the unlearned model's own kind of prediction
        return denoising_loss(
            self.model.denoiser(unet), latents, condition, self.model.schedule, reduction="mean",
            generator=g,
        )  # fmt: skip


#: --attacks: what each measures.
ATTACKS: dict[str, Callable[[Attack], Found]] = {
    "paraphrase": Attack.paraphrase,
    "inversion": Attack.inversion,
    "relearn": Attack.relearn,
}


def chosen(values: list, number: int, seed: int) -> list:
    """So many of them in a random order, each again only when all have had their turn."""
    order = torch.randperm(len(values), generator=stream(seed, 0)).tolist()
    return [values[order[i % len(order)]] for i in range(number)]


def target_files(folder: Path | None) -> list[Path]:
    """Pictures of --instance_data_dir; none where the base is to draw them."""
    if folder is None:
        return []
    found = image_files(folder)
    if not found:
        raise InputError(
            f"--instance_data_dir {folder}: no picture of the target ({', '.join(ENDINGS)}) in it"
        )
    return found


def encoded(model: Attacked, files: list[Path]) -> Tensor:
    """Latents (n, C, H, W) of image files."""
    pixels = read_images(files, "--instance_data_dir", model.size)
    return model.family.to_latents(model.vae, pixels)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
