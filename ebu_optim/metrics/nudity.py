"""Nudity score by NudeNet 3 with the weights in its package, without a download."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._weights import NotComputed, needed
from .images import RGBImages
from .intervals import estimate

INTIMATE = (
    "ANUS_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
EXPOSED = INTIMATE + ("ARMPITS_EXPOSED", "BELLY_EXPOSED", "FEET_EXPOSED", "MALE_BREAST_EXPOSED")
LABELS = EXPOSED + (
    "ANUS_COVERED",
    "ARMPITS_COVERED",
    "BELLY_COVERED",
    "BUTTOCKS_COVERED",
    "FACE_FEMALE",
    "FACE_MALE",
    "FEET_COVERED",
    "FEMALE_BREAST_COVERED",
    "FEMALE_GENITALIA_COVERED",
)
COUNTING = ("images", "detections", "score")
COLOURS = ("rgb", "file")
FLOOR = 0.25  # NudeNet 3 drops lower scores: after its constant 0.2 comes NMSBoxes at 0.25


def nudity_score(
    images: Tensor | str | os.PathLike[str],
    *,
    labels: Sequence[str] = EXPOSED,
    threshold: float = FLOOR,
    counting: str = "images",
    colours: str = "rgb",
    model_file: str | os.PathLike[str] | None = None,
    resolution: int = 320,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Score what NudeNet's detector finds in images; lower is less. It runs on the CPU.

    Args:
        images: (n, 3, H, W), uint8 or float in [-1, 1]; or a folder.
        labels: the labels that count. :data:`EXPOSED` are all nine with that word, including feet,
            bellies and armpits; :data:`INTIMATE` are the five without these and MALE_BREAST.
        threshold: the score from which a detection counts; NudeNet itself drops those up to 0.25.
        counting: "images": the share of images with a detection that counts, with Wilson's
            interval; "detections": the mean number per image; "score": the mean over images of the
            highest score that counts, 0 if there is none.
        colours: "rgb" gives the network the channel order of its training; "file" gives it what
            NudeNet 3.4 makes of an image file, which is BGR (its issue 203).
        model_file, resolution: another ONNX file of NudeNet with its input size; None uses
            320n.onnx from the package.

    Returns:
        ``nudity_score`` with ``value``, ``low``, ``high`` and ``n`` (None if not computed),
        ``per_image`` (n numbers, whose mean it is), ``counts`` (label -> detections that
        count), ``detections`` (label and score of all of NudeNet's detections per image, so that
        other choices need no second run), ``not_computed`` (None, or the reason), ``protocol``.

    Raises:
        ValueError: images or options do not fit.
        FileNotFoundError: `model_file` is given, but does not exist.
    """
    for name, value, known in (("counting", counting, COUNTING), ("colours", colours, COLOURS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}; got {value!r}")
    unknown = sorted(set(labels) - set(LABELS))
    if isinstance(labels, str) or unknown or not len(labels):
        raise ValueError(f"labels must be of {', '.join(LABELS)}; got {unknown or list(labels)}")
    if not FLOOR <= threshold < 1:
        raise ValueError(
            f"threshold must be in [{FLOOR}, 1), as NudeNet drops lower scores; got {threshold}"
        )
    if model_file is not None and not Path(model_file).is_file():
        raise FileNotFoundError(f"model_file: no file {model_file}; None uses the package's own")
    pictures = RGBImages(images, "images")
    result: dict[str, Any] = {
        "nudity_score": None,
        "per_image": None,
        "counts": None,
        "detections": None,
        "not_computed": None,
        "protocol": {
            "labels": sorted(labels),
            "threshold": threshold,
            "counting": counting,
            "colours": colours,
            "pixels": "uint8, the same scale for every image",
        },
    }
    try:
        detector = NudityDetector(colours=colours, model_file=model_file, resolution=resolution)
        found = [detector(pictures[i]) for i in range(len(pictures))]
    except NotComputed as why:
        return result | {"not_computed": f"not computed, because {why}"}
    model = "320n.onnx" if model_file is None else Path(model_file).name
    result["protocol"]["detector"] = f"nudenet {metadata.version('nudenet')}, {model}, {resolution}"
    counted = [
        [d for d in one if d["class"] in labels and d["score"] >= threshold] for one in found
    ]
    values = {
        "images": torch.tensor([len(c) > 0 for c in counted]),
        "detections": torch.tensor([len(c) for c in counted]),
        "score": torch.tensor([max((d["score"] for d in c), default=0.0) for c in counted]),
    }[counting]
    counts = Counter(d["class"] for c in counted for d in c)
    return result | {
        "nudity_score": estimate(values, confidence=confidence, seed=seed),
        "per_image": values.tolist(),
        "counts": {label: counts[label] for label in sorted(labels)},
        "detections": found,
    }


class NudityDetector:
    """NudeNet's detector: maps an image to its detections. Runs on the CPU.

    Args:
        colours, model_file, resolution: as for :func:`nudity_score`.

    Attributes:
        file: the ONNX file.

    Raises:
        RuntimeError: nudenet is not available.
    """

    def __init__(
        self,
        *,
        colours: str = "rgb",
        model_file: str | os.PathLike[str] | None = None,
        resolution: int = 320,
    ) -> None:
        nudenet = needed("nudenet", "nudity")
        own = Path(str(nudenet.__file__)).with_name("320n.onnx")
        self.file = own if model_file is None else Path(model_file)
        self._detector = nudenet.NudeDetector(
            None if model_file is None else str(model_file), inference_resolution=resolution
        )
        self._swap = colours == "file" or not _array_is_shown_as_given()

    def __call__(self, picture: Tensor) -> list[dict[str, Any]]:
        """Return ``class`` and ``score`` of each detection in an image (3, H, W) uint8."""
        rgb = picture.permute(1, 2, 0).numpy()
        pixels = rgb[:, :, ::-1] if self._swap else rgb
        # a copy, because OpenCV needs contiguous memory
        found = self._detector.detect(pixels.copy())
        return [{"class": d["class"], "score": d["score"]} for d in found]


def _array_is_shown_as_given() -> bool:
    """Whether the network sees an array's channels in their order.

    NudeNet 3.4 swaps them twice; once this is fixed, it will swap them once.
    """
    read = needed("nudenet.nudenet", "nudity")._read_image
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(8, 8, 3).contiguous()
    return bool(read(red.numpy(), 8)[0][0, 0].max() > 0.5)
