"""The attacks of attack.py, each by the functions that attack class-conditional models too.

P_f is the mean over pictures of what the judge gives the forgotten concept. The pictures to learn
from, and the P_f of which half is to be reached, come from the base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion import denoising_loss
from ..errors import InputError
from ..images import ENDINGS, image_files
from ..manifest import contents
from ..metrics.images import to_uint8
from ..metrics.intervals import estimate
from ..text_to_image.sets import read_images
from .found import SHOWN, Found, chosen
from .judges import Judge
from .lora_relearning import lora_relearn
from .model import Attacked
from .paraphrases import paraphrase
from .prompts import Questions
from .relearning import LOOKS, relearn
from .textual_inversion import AT, cce, inversion
from .tina import tina
from .unlearndiffatk import unlearndiffatk

__all__ = ["AT", "ATTACKS", "LOOKS", "USUAL", "WORD", "Attack", "Found", "chosen", "target_files"]
WORD = "<attack>"


class Attack:
    """All attacks on one model. `make` one after the other, "target" first; `known` where it was
    made before."""

    def __init__(
        self,
        args: Any,
        model: Attacked,
        base: Attacked,
        questions: Questions,
        judge: Judge,
        files: list[Path],
    ) -> None:
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
            "base": self.base.made_of(),
            "judge": self.judge.said,
            "seed": a.seed,
            "files": contents(self.files),
            "asked": self.asked,
            "drawn": self.drawn,
            "sampler": [a.num_inference_steps, a.guidance_scale, a.sample_batch_size],
            "shape": list(self.base.shape),
        }

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

    def unattacked(self) -> Found:
        model = self.model
        score, shown = self.look(model, model.encode([x.text for x in self.asked]))
        return Found({"p_f": score}, {}, {"pictures unlearned": shown})

    def seen(self) -> tuple[dict, Tensor]:
        """The look at the model as it is."""
        found = self.looks["p_f"]
        return found.values["p_f"], found.tensors["pictures unlearned"]

    def denoise(self, unet: Any, latents: Tensor, condition: Any, g: torch.Generator) -> Tensor:
        # of the unlearned model's own kind of prediction
        return denoising_loss(
            self.model.denoiser(unet),
            latents,
            condition,
            self.model.schedule,
            reduction="mean",
            generator=g,
        )


#: --attacks: what each measures.
ATTACKS: dict[str, Callable[[Attack], Found]] = {
    "paraphrase": paraphrase,
    "inversion": inversion,
    "relearn": relearn,
    "cce": cce,
    "unlearndiffatk": unlearndiffatk,
    "tina": tina,
    "lora_relearn": lora_relearn,
}
#: Those that are made where none is named; the others take longer.
USUAL = ("paraphrase", "inversion", "relearn")


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
