"""FID's Inception on images that are prepared as published code prepares them.

torch-fidelity's extractor resizes by itself, as TensorFlow 1 did. Other code resizes with PIL
before the network, and its FID is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import require
from ..images import pixels_of
from ._weights import load_into, needed, torchvision_weights

SIZE = 299
FEATURES = 2048


def clean(image: Any) -> Tensor:
    """Prepare a PIL image of mode RGB as clean-fid does, (3, 299, 299) float32.

    Each channel is resized with a bicubic filter in float32 and is not rounded to 8 bits.
    """
    bicubic = require("PIL.Image", "metrics").Resampling.BICUBIC
    floats = (c.convert("F").resize((SIZE, SIZE), bicubic) for c in image.split())
    pixels = [torch.frombuffer(bytearray(c.tobytes()), dtype=torch.float32) for c in floats]
    return (torch.stack(pixels).view(3, SIZE, SIZE).clamp(0, 255) - 128) / 128


def text2image(image: Any) -> Tensor:
    """Prepare a PIL image of mode RGB as text2image-benchmark does, (3, 299, 299) float32.

    The square in the middle is resized with a bicubic filter and rounded to 8 bits.
    """
    bicubic = require("PIL.Image", "metrics").Resampling.BICUBIC
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), bicubic)
    return 2 * (pixels_of(square).float() / 255) - 1


def unlearncanvas(image: Any) -> Tensor:
    """Prepare a PIL image of mode RGB as UnlearnCanvas does, (3, 299, 299) float32 in [-1, 1].

    OpenCV's bilinear resize, which does not smooth: to 512 pixels in 8 bits, then to 299 in floats.
    """
    pixels = pixels_of(image)[None].float()
    if pixels.shape[2:] != (512, 512):
        pixels = _bilinear(pixels, 512).round()
    return 2 * _bilinear(pixels / 255, SIZE)[0] - 1


def _bilinear(x: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)


PREPARED: dict[str, Callable[[Any], Tensor]] = {
    "clean": clean,
    "text2image": text2image,
    "unlearncanvas": unlearncanvas,
}


def network(weights: Path, device: str | torch.device) -> nn.Module:
    """Return the network without its resize: (n, 3, 299, 299) float32 in [-1, 1] -> (n, 2048).

    Args:
        weights: a file that :func:`ebu_optim.metrics.fid.inception_file` has checked.
    """
    found = require("torch_fidelity.feature_extractor_inceptionv3", "metrics")
    with torch.random.fork_rng(devices=[]):  # the initial weights are random, then replaced
        extractor = found.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
    layers = [layer for name, layer in extractor.named_children() if name != "fc"]
    return nn.Sequential(*layers, nn.Flatten()).eval().to(device)


def torchvision_weights_of(file: Path | None, *, progress: bool = False) -> dict[str, Tensor]:
    """Return the weights of torchvision's Inception, which was trained apart from that of FID.

    Raises:
        NotComputed: torchvision or the weights are not available.
        ValueError: the file holds no state dict.
    """
    entry = needed("torchvision.models", "text-to-image").Inception_V3_Weights.IMAGENET1K_V1
    return torchvision_weights(entry, file, "inception_weights", progress)


def torchvision_network(weights: dict[str, Tensor], device: str | torch.device) -> nn.Module:
    """Return torchvision's network up to the mean over Mixed_7c's places, as `network` is.

    UnlearnCanvas gives it images in [-1, 1], which it then normalises as if they were in [0, 1].

    Raises:
        ValueError: they are weights of another network.
    """
    models = needed("torchvision.models", "text-to-image")
    model = models.inception_v3(weights=None, transform_input=True, init_weights=False)
    load_into(model, weights, "inception_weights")
    model.fc = nn.Identity()
    return model.eval().to(device)
