"""FID and KID of the kept classes by torch-fidelity, or the reason why they were not computed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..files import replacing
from ._weights import NotComputed, needed
from .images import RGBImages
from .naming import name_of

Images = Tensor | str | os.PathLike[str]
LAYERS = ("64", "192", "768", "2048")


def fid(
    images: Images,
    reference: Images,
    *,
    reference_split: str,
    labels: Tensor | None = None,
    reference_labels: Tensor | None = None,
    forget: Sequence[int] = (),
    inception_weights: str | os.PathLike[str] | None = None,
    feature_layer: str = "2048",
    kid_subsets: int = 100,
    kid_subset_size: int | None = None,
    batch_size: int = 64,
    unreadable: str = "raise",
    device: str | torch.device = "cpu",
    seed: int = 2020,
    progress: bool = False,
) -> dict[str, Any]:
    """Frechet and kernel Inception distance; lower is closer.

    Both are biased or noisy with few images. FID is biased upwards, by a lot below some 10,000
    images, so compare it only at equal numbers of images. KID is unbiased.

    Args:
        images: the model's images: (n, C, H, W) with C of 1 (repeated to RGB) or 3, uint8 in 0..255
            or float in [-1, 1]; or a folder, including its subfolders.
        reference: real images, given in the same way.
        reference_split: a description of these, such as "CIFAR-10 train, 9 classes".
        labels, reference_labels: (n,) and (m,); with `forget`, the images of those classes are left
            out of both sets. Only for tensors: a folder must hold only kept classes.
        inception_weights: path of torch-fidelity's weights file; None uses the file under
            TORCH_HOME, and downloads it (96 MB) if it is missing.
        feature_layer: "2048" is FID's. Any other layer is not FID and is reported as
            ``frechet_<layer>`` and ``kernel_<layer>``.
        kid_subset_size: None is 1000, but at most half of the smaller set, so that the subsets
            differ and their standard deviation is meaningful.
        unreadable: for a folder: "raise" raises ValueError and names the unreadable files, "skip"
            leaves them out and lists them under ``skipped``.

    Returns:
        ``fid``, ``kid_mean``, ``kid_std`` (None if not computed), ``not_computed`` (None, or
        the reason), ``skipped`` (files left out), ``protocol`` (sizes, layer, weights, versions).

    Raises:
        ValueError: images, labels or options do not fit; `inception_weights` is another file.
        FileNotFoundError: `inception_weights` is given, but does not exist.
    """
    if feature_layer not in LAYERS:
        raise ValueError(f"feature_layer must be one of {LAYERS}; got {feature_layer!r}")
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, as torch-fidelity requires; got {place}")
    ours = RGBImages(_kept(images, labels, forget, "images"), "images", unreadable, least=2)
    theirs = RGBImages(
        _kept(reference, reference_labels, forget, "reference"), "reference", unreadable, least=2
    )
    smaller = min(len(ours), len(theirs))
    if kid_subset_size is None:
        kid_subset_size = min(1000, max(2, smaller // 2))
    if not 2 <= kid_subset_size <= smaller or kid_subsets < 1:
        raise ValueError(
            f"kid_subset_size must be in 2..{smaller}, the images of the smaller set, and "
            f"kid_subsets >= 1; got {kid_subset_size} and {kid_subsets}"
        )
    names: tuple[str, ...] = ("fid", "kid_mean", "kid_std")
    if feature_layer != "2048":
        names = tuple(
            n.replace("fid", f"frechet_{feature_layer}").replace("kid", f"kernel_{feature_layer}")
            for n in names
        )
    result: dict[str, Any] = {
        **dict.fromkeys(names),
        "not_computed": None,
        "skipped": {"images": ours.skipped, "reference": theirs.skipped},
        "protocol": {
            "images": len(ours),
            "reference_images": len(theirs),
            "reference_split": reference_split,
            "left_out": sorted(forget),
            "extractor": "inception-v3-compat of torch-fidelity",
            "layer": feature_layer,
            "colours": "RGB",
            "pixels": "uint8, the same scale for every image",
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "seed": seed,
        },
    }
    try:
        fidelity = needed("torch_fidelity", "metrics")
        weights = inception_file(inception_weights, progress)
    except NotComputed as why:
        result["not_computed"] = f"not computed, because {why}"
        return result
    # building the extractor samples random weights, and it uses only the current CUDA device
    with (
        torch.random.fork_rng(devices=[]),
        torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext(),
    ):
        found = fidelity.calculate_metrics(
            input1=ours,
            input2=theirs,
            fid=True,
            kid=True,
            cuda=place.type == "cuda",
            batch_size=batch_size,
            feature_extractor_weights_path=str(weights),
            feature_layer_fid=feature_layer,
            feature_layer_kid=feature_layer,
            kid_subsets=kid_subsets,
            kid_subset_size=kid_subset_size,
            rng_seed=seed,
            cache=False,
            save_cpu_ram=True,
            verbose=progress,
        )
    result |= zip(
        names,
        (
            found["frechet_inception_distance"],
            found["kernel_inception_distance_mean"],
            found["kernel_inception_distance_std"],
        ),
    )
    result["protocol"] |= {"weights": weights.name, "torch_fidelity": fidelity.__version__}
    return result


def _kept(source: Images, labels: Tensor | None, forget: Sequence[int], name: str) -> Images:
    """Return the images of the kept classes."""
    labels_name = "labels" if name == "images" else "reference_labels"
    if not len(forget):
        return source
    if not isinstance(source, Tensor):
        if labels is not None:
            raise ValueError(
                f"{labels_name} needs a tensor, but {name} is a folder; remove the images of the "
                "forgotten classes from it, and leave the labels out"
            )
        return source
    if labels is None or labels.shape != source.shape[:1]:
        raise ValueError(
            f"{labels_name} must have shape ({len(source)},), one per image, to leave out the "
            f"classes {sorted(forget)}; got {None if labels is None else tuple(labels.shape)}"
        )
    return source[~torch.isin(labels.cpu(), torch.tensor(list(forget)))]


def inception_file(given: str | os.PathLike[str] | None, progress: bool) -> Path:
    """Return a checked weights file, because torch-fidelity unpickles the file that it gets.

    Raises:
        NotComputed: torch-fidelity is not installed, or none is given and none is to be had.
        ValueError: the given file holds something else.
        FileNotFoundError: it does not exist.
    """
    needed("torch_fidelity", "metrics")
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(
                f"{name_of('inception_weights')}: no file {path}; give the path of "
                "torch-fidelity's weights, or None for its own download"
            )
        problem = _no_inception(path)
        if problem:
            raise ValueError(f"{name_of('inception_weights')}: {path} {problem}")
        return path
    url = require("torch_fidelity.feature_extractor_inceptionv3", "metrics").URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        problem = _no_inception(path)
        if problem:
            raise NotComputed(f"{path} {problem}; delete it, and it is downloaded again")
        return path
    try:
        with replacing(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), progress=progress)
            problem = _no_inception(temporary)  # torch raises no error if a connection ends early
            if problem:
                raise NotComputed(f"the download from {url} {problem}; try again")
    except OSError as error:  # URLError, HTTPError, a full disk
        raise NotComputed(
            f"the Inception weights could not be downloaded ({error}); give "
            f"{name_of('inception_weights')}=, or put the file of {url} at {path}"
        ) from error
    return path


def _no_inception(path: Path) -> str | None:
    """Return what is wrong with a weights file, or None. Its pickle is read with weights_only."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that it did not write
        reason = str(error).strip().partition("\n")[0]
        return f"is not a complete weights file ({type(error).__name__}: {reason})"
    fc = state.get("fc.weight") if isinstance(state, dict) else None
    if not isinstance(fc, Tensor) or tuple(fc.shape) != (1008, 2048):
        return (
            "does not hold weights of torch-fidelity's Inception, whose fc.weight is (1008, 2048)"
        )
    return None
