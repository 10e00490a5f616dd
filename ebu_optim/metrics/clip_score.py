"""CLIP score: how well an image fits its prompt, computed with open_clip."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ._weights import NotComputed, needed
from .images import RGBImages
from .intervals import estimate
from .naming import name_of

# cosine in [-1, 1] -> score
SCALES = {
    "cosine": lambda c: c,
    "x100": lambda c: 100 * c,
    "w2.5": lambda c: 2.5 * c.clamp_min(0),
}


def clip_score(
    images: Tensor | str | os.PathLike[str],
    prompts: str | Sequence[str],
    *,
    model: str = "ViT-B-32-quickgelu",
    pretrained: str | os.PathLike[str] = "openai",
    scale: str = "cosine",
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    r"""Return the mean over images of the cosine c of CLIP's embeddings of image and prompt.

    .. math:: c_i = \frac{E_I(x_i) \cdot E_T(y_i)}{|E_I(x_i)| \, |E_T(y_i)|}

    Args:
        images: (n, 3, H, W), uint8 or float in [-1, 1]; or a folder, whose file names are sorted
            as text: 10.png comes before 2.png.
        prompts: n prompts, or one for all images.
        model: one of open_clip.list_models(). OpenAI's own weights need the names with -quickgelu.
        pretrained: a tag of open_clip.list_pretrained_tags_by_model(model), which is read from the
            hub's cache or downloaded; or a weights file (.pt, .safetensors).
        scale: "cosine" c; "x100" 100 c; "w2.5" 2.5 max(c, 0), CLIPScore (Hessel et al., 2021).
        confidence, seed: for the bootstrap interval.

    Returns:
        ``clip_score`` with ``value``, ``low``, ``high`` and ``n`` (None if not computed),
        ``per_image`` (n floats on that scale), ``not_computed`` (None, or the reason),
        ``protocol``.

    Raises:
        ValueError: images, prompts or options do not fit; a file holds other weights.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {tuple(SCALES)}; got {scale!r}")
    pictures = RGBImages(images, "images")
    texts = [prompts] * len(pictures) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(pictures):
        raise ValueError(
            f"prompts must be one for all images, or one per image, {len(pictures)}; got "
            f"{len(texts)}"
        )
    result: dict[str, Any] = {
        "clip_score": None,
        "per_image": None,
        "not_computed": None,
        "protocol": {
            "model": model,
            "weights": Path(pretrained).name,
            "scale": scale,
            "prompts": f"{len(set(texts))} for {len(texts)} images",
            "pixels": "uint8, RGB, the same scale for every image",
        },
    }
    try:
        judge = ClipCosine(model=model, pretrained=pretrained, batch_size=batch_size, device=device)
    except NotComputed as why:
        return result | {"not_computed": f"not computed, because {why}"}
    scores = SCALES[scale](judge(pictures, texts))
    result["protocol"] |= {
        "preprocessing": {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in judge.model.visual.preprocess_cfg.items()
        },
        "open_clip": require("open_clip", "text-to-image").__version__,
    }
    return result | {
        "clip_score": estimate(scores, confidence=confidence, seed=seed),
        "per_image": scores.tolist(),
    }


class ClipCosine:
    """CLIP: maps images and one text for each to the cosines of their embeddings.

    Args:
        model, pretrained: as for :func:`clip_score`.
        batch_size: number of images on the device at a time.

    Attributes:
        model: the open_clip model, in eval mode.

    Raises:
        RuntimeError: open_clip or the weights are not available.
        ValueError: the model or the weights file is not known.
    """

    def __init__(
        self,
        *,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str | os.PathLike[str] = "openai",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        open_clip = needed("open_clip", "text-to-image")
        self.model, self._preprocess = _load(open_clip, model, str(pretrained))
        self.model.to(device)
        self._tokenizer, self._size = open_clip.get_tokenizer(model), batch_size

    def __call__(self, images: Tensor | RGBImages, texts: Sequence[str]) -> Tensor:
        """Return (n,) float64 on the CPU.

        Args:
            images: (n, 3, H, W), uint8 or float in [-1, 1].
            texts: n texts.
        """
        pictures = images if isinstance(images, RGBImages) else RGBImages(images, "images")
        found, at = [], 0
        for a in self.embed_images(pictures):
            b = self.embed_texts(texts[at : at + len(a)])
            found.append(torch.nn.functional.cosine_similarity(a, b).cpu())
            at += len(a)
        return torch.cat(found)

    @torch.no_grad()
    def embed_images(self, pictures: RGBImages) -> Iterator[Tensor]:
        """Yield (n, D) float64 on the device, one batch after the other."""
        image = require("PIL.Image", "text-to-image")
        device = next(self.model.parameters()).device
        for batch in pictures.batches(self._size):
            # PIL images, because the model's own preprocessing takes them, like images from files
            each = [image.fromarray(p.permute(1, 2, 0).numpy()) for p in batch]
            x = torch.stack([self._preprocess(p) for p in each])
            yield self.model.encode_image(x.to(device)).double()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return (n, D) float64 on the device."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self._tokenizer(list(texts)).to(device)).double()


class ClipClassifier:
    """CLIP as a classifier over texts, without training (Radford et al., 2021).

    It maps images to logits: 100 times the cosine between an image and each text.

    Args:
        texts: what an image may show.
        model, pretrained: as for :func:`clip_score`.
        batch_size: number of images on the device at a time.

    Attributes:
        model: the open_clip model, in eval mode.

    Raises:
        RuntimeError: open_clip or the weights are not available.
        ValueError: the model or the weights file is not known.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        model: str = "ViT-B-32-quickgelu",
        pretrained: str | os.PathLike[str] = "openai",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self._cosine = ClipCosine(
            model=model, pretrained=pretrained, batch_size=batch_size, device=device
        )
        self.model, self.texts = self._cosine.model, list(texts)

    def __call__(self, images: Tensor) -> Tensor:
        """Map (n, 3, H, W), uint8 or float in [-1, 1], to (n, texts) float64 on the CPU."""
        b = self._cosine.embed_texts(self.texts)
        cosines = [
            torch.nn.functional.cosine_similarity(a[:, None], b, dim=-1).cpu()
            for a in self._cosine.embed_images(RGBImages(images, "images"))
        ]
        return 100 * torch.cat(cosines)


def _load(open_clip: Any, model: str, pretrained: str) -> tuple[Any, Any]:
    """Return the model in eval mode, on the CPU, and its preprocessing."""
    known = open_clip.list_models()
    if model not in known:
        near = get_close_matches(model, known, n=3, cutoff=0.3)
        raise ValueError(
            f"{name_of('model')} must be in open_clip.list_models(), such as {near}; got {model!r}"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    local = pretrained not in tags
    if local and not Path(pretrained).is_file():
        raise ValueError(
            f"{name_of('pretrained')} must be a weights file or a tag of {model}, {tags}; got "
            f"{pretrained!r}"
        )
    if not local:
        wanted = open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
        if wanted != open_clip.get_model_config(model).get("quick_gelu", False):
            other = model.removesuffix("-quickgelu") + "-quickgelu" * wanted
            raise ValueError(
                f"{name_of('model')}={model!r} has another activation than the weights "
                f"{pretrained!r} were trained with, so its scores would be wrong; give "
                f"{name_of('model')}={other!r}"
            )
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights are random, then replaced
            judge, preprocess = open_clip.create_model_from_pretrained(
                model, pretrained=pretrained, weights_only=True
            )
    except Exception as error:  # other files, and a missing network, raise many types
        reason = str(error).strip().partition("\n")[0]
        if local:
            raise ValueError(
                f"{name_of('pretrained')}: {pretrained} does not hold weights of {model} "
                f"({type(error).__name__}: {reason})"
            ) from error
        raise NotComputed(
            f"the CLIP weights {pretrained!r} of {model} are not available ({reason}); give "
            f"{name_of('pretrained')}= the path of their file"
        ) from error
    return judge.eval(), preprocess
