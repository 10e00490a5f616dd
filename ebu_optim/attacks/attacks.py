"""The attacks of attack.py, which use the same functions as those on class-conditional models.

P_f is the mean over images of the judge's score for the forgotten concept. The images to learn
from come from the base model, and so does the P_f of which relearning must reach half.
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
    """All attacks on one model.

    Call `make` for one after the other, "target" first, and `known` with each result."""

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
        #: the prompts of every evaluation, and those of the images to learn from
        self.asked = chosen(forget, args.attack_images, args.seed)
        self.drawn = chosen(forget, args.target_images, args.seed + 1)
        self.looks: dict[str, Found] = {}

    def make(self, name: str) -> Found:
        return {"target": Attack.target, "p_f": Attack.unattacked, **ATTACKS}[name](self)

    def known(self, name: str, found: Found) -> None:
        """Record a result, made now or read from a file.

        Raises:
            InputError: the base does not generate the target.
        """
        self.looks[name] = found
        if name == "target" and not found.values["p_f"]["value"] > 0:
            raise InputError(
                f"the judge finds the target in no image that the base generates for "
                f"{self.asked[0].text!r} and similar prompts (P_f 0): check --base_model, "
                "--forget and the judge"
            )

    # -- what is generated and what is learned from ----------------------------------------------

    def look(self, model: Attacked, embeddings: Tensor, unet: Any = None) -> tuple[dict, Tensor]:
        """P_f with its interval, and some of the images (n, 3, H, W) uint8.

        The noise is always the same.

        Args:
            embeddings: the embeddings of `asked`, in that order.
        """
        latents = model.latents(embeddings, self.args.seed, unet, self.asked)
        pictures = model.pictures(latents)
        score = estimate(self.judge.score(pictures), seed=self.args.seed)
        return score, to_uint8(pictures[:SHOWN])

    def target_protocol(self) -> dict[str, Any]:
        """Everything that the target depends on."""
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
        """Latents of the target, and the P_f of the base."""
        base = self.base
        score, _ = self.look(base, base.encode([x.text for x in self.asked]))
        if self.files:
            latents = encoded(base, self.files)
            prompts = torch.arange(len(latents)) % len(self.drawn)
            said = {"pictures": f"{len(latents)} of a folder"}
        else:
            # the sampler's latents, without decoding and encoding
            texts = [x.text for x in self.drawn]
            latents = base.latents(base.encode(texts), self.args.seed + 1, asked=self.drawn)
            prompts = torch.arange(len(latents))
            said = {"pictures": f"{len(latents)} drawn by the base"}
        shown = to_uint8(base.pictures(latents[:SHOWN]))
        tensors = {"latents": latents, "prompts": prompts, "pictures target": shown}
        return Found({"p_f": score}, said, tensors)

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The latents of rows of the target, and the indices of their prompts in `drawn`.

        Args:
            rows: row numbers (n, 1, 1, 1). The attacks pass them as images, so that they select
                images together with their prompts.
        """
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
        """P_f and images of the model without an attack."""
        found = self.looks["p_f"]
        return found.values["p_f"], found.tensors["pictures unlearned"]

    def denoise(self, unet: Any, latents: Tensor, condition: Any, g: torch.Generator) -> Tensor:
        # uses the prediction type of the unlearned model
        return denoising_loss(
            self.model.denoiser(unet),
            latents,
            condition,
            self.model.schedule,
            reduction="mean",
            generator=g,
        )


#: Value of --attacks -> its function.
ATTACKS: dict[str, Callable[[Attack], Found]] = {
    "paraphrase": paraphrase,
    "inversion": inversion,
    "relearn": relearn,
    "cce": cce,
    "unlearndiffatk": unlearndiffatk,
    "tina": tina,
    "lora_relearn": lora_relearn,
}
#: The default attacks; the others take longer.
USUAL = ("paraphrase", "inversion", "relearn")


def target_files(folder: Path | None) -> list[Path]:
    """The images in --instance_data_dir; empty if the base generates them.

    Raises:
        InputError: the folder has no image.
    """
    if folder is None:
        return []
    found = image_files(folder)
    if not found:
        raise InputError(
            f"--instance_data_dir {folder}: no image of the target ({', '.join(ENDINGS)}) in it"
        )
    return found


def encoded(model: Attacked, files: list[Path]) -> Tensor:
    """Latents (n, C, h, w) of image files."""
    pixels = read_images(files, "--instance_data_dir", model.size)
    return model.family.to_latents(model.vae, pixels)
