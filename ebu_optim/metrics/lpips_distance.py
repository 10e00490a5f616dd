"""LPIPS: how far an image is from another one in the features of a trained network.

It uses the package of the metric's authors, which includes the calibrated linear weights. The
weights of the backbone are torchvision's and are not included.
"""

from __future__ import annotations

import os
import warnings
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ._weights import NotComputed, load_into, needed, torchvision_weights
from .images import RGBImages
from .intervals import estimate
from .naming import name_of

# the backbones' entries in torchvision, and the least image side that leaves a pixel of features
NETS = {
    "alex": ("AlexNet_Weights", 31),
    "vgg": ("VGG16_Weights", 16),
    "squeeze": ("SqueezeNet1_1_Weights", 17),
}


def lpips_distance(
    images: Tensor | str | os.PathLike[str],
    reference: Tensor | str | os.PathLike[str],
    *,
    net: str = "alex",
    weights_file: str | os.PathLike[str] | None = None,
    size: int | None = None,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    r"""Return the mean LPIPS distance of image pairs, such as before and after unlearning.

    .. math:: d(x, y) = \sum_l \frac{1}{H_l W_l} \sum_{h, w}
        \sum_c w_{lc} \, (\hat f^l_{hwc}(x) - \hat f^l_{hwc}(y))^2

    where f are the features of layer l, scaled to length 1 over the channels c.

    Args:
        images: (n, 3, H, W), uint8 or float in [-1, 1]; or a folder, in the order of its names.
        reference: the same for the model before unlearning, image by image.
        net: the backbone, "alex" (most published figures), "vgg" or "squeeze".
        weights_file: torchvision's ImageNet weights of the backbone, of which ``features.*`` are
            used; None uses torchvision's cache or downloads (244, 553 and 5 MB).
        size: the shorter side is first resized to this; None keeps the size. ESD's script uses 64.

    Returns:
        ``lpips`` with ``value``, ``low``, ``high`` and ``n`` (None if not computed),
        ``per_image``, ``not_computed`` (None, or the reason), ``protocol``.

    Raises:
        ValueError: images or options do not fit; `weights_file` holds other weights.
        FileNotFoundError: `weights_file` is given, but does not exist.
    """
    if net not in NETS:
        raise ValueError(f"net must be one of {tuple(NETS)}; got {net!r}")
    ours, theirs = RGBImages(images, "images"), RGBImages(reference, "reference")
    shapes = [(len(x), *x[0].shape) for x in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"images and {name_of('reference')} must pair up; got {shapes[0]} and {shapes[1]}; "
            "give the images of the same prompts and seeds, in the same order and of the same size"
        )
    names = [[file.name for file in x.source] for x in (ours, theirs) if isinstance(x.source, list)]
    if len(names) == 2 and names[0] != names[1]:
        a, b = next(pair for pair in zip(*names) if pair[0] != pair[1])
        raise ValueError(
            f"images and {name_of('reference')} must pair up by name; {a} would pair with {b}; "
            "give the files of a prompt and seed the same name in both folders"
        )
    side = min(shapes[0][2:]) if size is None else size
    if side < NETS[net][1]:
        raise ValueError(
            f"{'images' if size is None else 'size'}: {net!r} needs a side of at least "
            f"{NETS[net][1]} pixels; got {side}"
        )
    result: dict[str, Any] = {
        "lpips": None,
        "per_image": None,
        "not_computed": None,
        "protocol": {
            "network": f"{net}, linear weights v0.1",
            "size": "as generated" if size is None else size,
            "shape": list(shapes[0][1:]),
            "pixels": "uint8, RGB, the same scale for every image",
        },
    }
    try:
        judge = LpipsDistance(
            net=net, weights_file=weights_file, size=size, device=device, progress=progress
        )
    except NotComputed as why:
        return result | {"not_computed": f"not computed, because {why}"}
    result["protocol"]["package"] = f"lpips {metadata.version('lpips')}"
    pairs = zip(ours.batches(batch_size), theirs.batches(batch_size))
    distances = torch.cat([judge(*pair) for pair in pairs])
    return result | {
        "lpips": estimate(distances, confidence=confidence, seed=seed),
        "per_image": distances.tolist(),
    }


class LpipsDistance:
    """Maps pairs of images to their LPIPS distances.

    Args:
        net, weights_file, size: as for :func:`lpips_distance`.

    Raises:
        RuntimeError: lpips, torchvision or the weights are not available.
        ValueError: `weights_file` holds other weights.
        FileNotFoundError: `weights_file` does not exist.
    """

    def __init__(
        self,
        *,
        net: str = "alex",
        weights_file: str | os.PathLike[str] | None = None,
        size: int | None = None,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        self.model = _load(net, weights_file, progress).to(device)
        self.size, self._device = size, device
        self._resize = needed("torchvision.transforms.functional", "text-to-image").resize

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return (n,) float64 on the CPU for two (n, 3, H, W) uint8."""
        if self.size is not None:
            a, b = (self._resize(x, self.size, antialias=True) for x in (a, b))
        a, b = (x.to(self._device).float() / 127.5 - 1 for x in (a, b))
        return self.model(a, b).double().flatten().cpu()


def _load(net: str, weights_file: str | os.PathLike[str] | None, progress: bool) -> torch.nn.Module:
    lpips = needed("lpips", "text-to-image")
    entry = getattr(needed("torchvision.models", "text-to-image"), NETS[net][0]).IMAGENET1K_V1
    state = torchvision_weights(entry, weights_file, "weights_file", progress)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision warns of an argument that lpips still uses
        judge: torch.nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    backbone: Any = judge.net
    # the backbone's slices keep torchvision's numbers: slice2.3.weight is features.3.weight
    names = {key: f"features.{key.partition('.')[2]}" for key in backbone.state_dict()}
    load_into(backbone, {k: state[v] for k, v in names.items() if v in state}, "weights_file")
    return judge.eval()
