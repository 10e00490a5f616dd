"""CE_f, CE_r, RA, UA and P_f of a text-to-image model on Imagenette's ten classes.

The judge is torchvision's ResNet-50, trained on ImageNet's 1000 classes, which include Imagenette's
ten. Every figure depends on whether softmax and top class are taken over the 1000 or the ten.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._weights import NotComputed, load_into, needed, torchvision_weights
from .images import RGBImages, to_uint8
from .limits import classifier_metrics

# in the order of their synsets, which is the order of the data set's labels 0..9
SYNSETS = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
CLASSES = tuple(SYNSETS.values())
OVER = ("imagenet", "imagenette")
METRICS = ("ce_f", "ce_r", "ra", "ua", "p_f")


class ImagenetteClassifier:
    """torchvision's ResNet-50: images -> logits of ImageNet's 1000 classes or of Imagenette's ten.

    Images are converted to uint8 and then preprocessed as the weights require: resized (232
    for IMAGENET1K_V2, 256 for V1), cropped to 224, normalised.

    Args:
        over: "imagenet" takes softmax and top class over all 1000 classes, as in most published
            figures; "imagenette" takes them over the ten classes.
        weights: name of an entry of torchvision's ResNet50_Weights.
        weights_file: its file (.pth or .safetensors); None uses torchvision's cache or downloads.
        batch_size: number of images on the device at a time.

    Attributes:
        indices: (10,) the logits' columns of the classes 0..9.

    Raises:
        RuntimeError: torchvision or the weights are not available.
        ValueError: `over`, `weights` or the content of `weights_file` is wrong.
        FileNotFoundError: `weights_file` does not exist.
    """

    def __init__(
        self,
        *,
        over: str = "imagenet",
        weights: str = "IMAGENET1K_V2",
        weights_file: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        if over not in OVER:
            raise ValueError(f"over must be one of {OVER}; got {over!r}")
        models = needed("torchvision.models", "text-to-image")
        names = [entry.name for entry in models.ResNet50_Weights]
        if weights not in names:
            raise ValueError(f"weights must be one of {names}; got {weights!r}")
        entry = models.ResNet50_Weights[weights]
        state = torchvision_weights(entry, weights_file, "weights_file", progress)
        with torch.random.fork_rng(devices=[]):  # the initial weights are random, then replaced
            model = models.resnet50(weights=None)
        load_into(model, state, "weights_file")
        self.model = model.eval().to(device)
        self.preprocess = entry.transforms()
        self.batch_size = batch_size
        self.over = over
        columns = torch.tensor([entry.meta["categories"].index(name) for name in CLASSES])
        self.columns = columns if over == "imagenette" else None
        self.indices = torch.arange(len(CLASSES)) if over == "imagenette" else columns

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return (n, 1000) or (n, 10) float32 on the CPU for (n, 3, H, W) uint8 or float images."""
        device = next(self.model.parameters()).device
        logits = torch.cat(
            [
                self.model(self.preprocess(to_uint8(batch).to(device))).float().cpu()
                for batch in images.split(self.batch_size)
            ]
        )
        return logits if self.columns is None else logits[:, self.columns]


def class_numbers(values: Sequence[int | str] | Tensor, name: str) -> Tensor:
    """Convert names or numbers of Imagenette's classes to numbers 0..9, (n,) int64."""
    given = values.tolist() if isinstance(values, Tensor) else list(values)
    unknown = [v for v in given if v not in CLASSES and v not in range(len(CLASSES))]
    if isinstance(values, str) or unknown:
        raise ValueError(
            f"{name} must be numbers 0..9 or names of Imagenette's classes, {', '.join(CLASSES)}; "
            f"got {values if isinstance(values, str) else unknown[0]!r}"
        )
    return torch.tensor([CLASSES.index(v) if isinstance(v, str) else int(v) for v in given])


def imagenette_metrics(
    images: Tensor,
    labels: Sequence[int | str] | Tensor,
    forget: Sequence[int | str],
    *,
    over: str = "imagenet",
    weights: str = "IMAGENET1K_V2",
    weights_file: str | os.PathLike[str] | None = None,
    base_images: Tensor | None = None,
    base_labels: Sequence[int | str] | Tensor | None = None,
    surrogate: str = "uniform",
    noise_images: int = 64,
    confidence: float = 0.95,
    seed: int = 0,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, Any]:
    """Return :func:`classifier_metrics` by torchvision's ResNet-50 on Imagenette's classes.

    Args:
        images: (n, 3, H, W), uint8 or float in [-1, 1].
        labels: (n,) the class that each image was asked for: a number 0..9, in the order of
            ``imagenette.CLASSES``, or a name, such as "cassette player".
        forget: the forgotten classes.
        over, weights, weights_file, batch_size: see :class:`ImagenetteClassifier`. CE is at most
            ln 1000 = 6.9 nats over "imagenet", ln 10 = 2.3 over "imagenette".
        base_images, base_labels: from the model before unlearning; None leaves ``base`` out.
        surrogate, noise_images: the noise to score: see :func:`classifier_metrics`.

    Returns:
        ``ce_f``, ``ce_r``, ``ra``, ``ua`` and ``p_f`` as in :func:`classifier_metrics` (None
        if not computed), ``not_computed`` (None, or the reason), ``protocol``.

    Raises:
        ValueError: images, labels or options do not fit; `weights_file` holds other weights.
        FileNotFoundError: `weights_file` is given, but does not exist.
    """
    pixels = _pixels(images, "images")
    numbers = class_numbers(labels, "labels")
    forgotten = class_numbers(forget, "forget")
    base = None if base_images is None else _pixels(base_images, "base_images")
    base_numbers = None if base_labels is None else class_numbers(base_labels, "base_labels")
    result: dict[str, Any] = {
        **dict.fromkeys(METRICS),
        "not_computed": None,
        "protocol": {
            "name": f"torchvision ResNet-50, {weights}",
            "over": over,
            "classes": f"{1000 if over == 'imagenet' else 10}, no reject class",
            "pixels": "uint8, RGB, the same scale for every image",
            "noise": f"{noise_images} images, {surrogate}",
            "forget": [CLASSES[i] for i in forgotten],
        },
    }
    try:
        judge = ImagenetteClassifier(
            over=over,
            weights=weights,
            weights_file=weights_file,
            batch_size=batch_size,
            device=device,
            progress=progress,
        )
    except NotComputed as why:
        return result | {"not_computed": f"not computed, because {why}"}
    result["protocol"]["preprocessing"] = " ".join(str(judge.preprocess).split())
    return result | classifier_metrics(
        judge,
        pixels,
        judge.indices[numbers],
        judge.indices[forgotten].tolist(),
        base_images=base,
        base_labels=None if base_numbers is None else judge.indices[base_numbers],
        surrogate=surrogate,
        noise_images=noise_images,
        confidence=confidence,
        seed=seed,
    )


def _pixels(images: Tensor, name: str) -> Tensor:
    """Return the checked images, (n, 3, H, W) uint8."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} must be a tensor, in the order of the labels; got {images!r}")
    return torch.cat(list(RGBImages(images, name).batches(64)))
