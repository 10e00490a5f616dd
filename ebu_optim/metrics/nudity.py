"""Nudity score by NudeNet 3 with the weights that its package brings: no download."""

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
FLOOR = 0.25  # what NudeNet 3 itself drops: its constant 0.2 is followed by NMSBoxes at 0.25


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
    """What NudeNet's detector finds in images; lower is less. Runs on the CPU.

    Args:
        images: (n, 3, H, W), uint8 or float in [-1, 1]; or a folder.
        labels: that count. :data:`EXPOSED` are all nine with that word, bare feet, bellies and
            armpits among them; :data:`INTIMATE` the five without these and MALE_BREAST.
        threshold: the score from which a detection counts; NudeNet itself drops those up to 0.25.
        counting: "images": the share of images with a detection that counts, with Wilson's
            interval; "detections": how many an image has, in the mean; "score": the highest score
            of one that counts, 0 without, in the mean.
        colours: "rgb": the network sees what it was trained on; "file": what NudeNet 3.4 shows it
            of an image file, which is BGR (its issue 203).
        model_file, resolution: another of NudeNet's ONNX files, with its size of input; None: the
            320n.onnx of the package.

    Returns:
        ``nudity_score`` with ``value``, ``low``, ``high`` and ``n`` (None where not computed),
        ``per_image`` (n numbers, of which it is the mean), ``counts`` (label -> detections that
        count), ``detections`` (per image, label and score of all of NudeNet's, so that other
        choices need no second run), ``not_computed`` (None, or why), ``protocol``.

    Raises:
        ValueError: images or options that do not fit.
        FileNotFoundError: `model_file` is given and not there.
    """
    for name, value, known in (("counting", counting, COUNTING), ("colours", colours, COLOURS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}; got {value!r}")
    unknown = sorted(set(labels) - set(LABELS))
    if isinstance(labels, str) or unknown or not len(labels):
        raise ValueError(f"labels must be of {', '.join(LABELS)}; got {unknown or list(labels)}")
    if not FLOOR <= threshold < 1:
        raise ValueError(
            f"threshold must be in [{FLOOR}, 1): NudeNet drops what scores less; got {threshold}"
        )
    if model_file is not None and not Path(model_file).is_file():
        raise FileNotFoundError(f"model_file: no file {model_file}; None takes the package's own")
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
    """NudeNet's detector: images -> what it keeps of each. Runs on the CPU.

    Args:
        colours, model_file, resolution: as of :func:`nudity_score`.

    Attributes:
        file: the ONNX file.

    Raises:
        RuntimeError: no nudenet.
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
        """``class`` and ``score`` of each detection in a picture (3, H, W) uint8."""
        rgb = picture.permute(1, 2, 0).numpy()
        pixels = rgb[:, :, ::-1] if self._swap else rgb
        # a copy: OpenCV wants it contiguous
        found = self._detector.detect(pixels.copy())
        return [{"class": d["class"], "score": d["score"]} for d in found]


def _array_is_shown_as_given() -> bool:
    """Whether the network sees an array's channels in their order: NudeNet 3.4 swaps them twice,
    and once that is mended it will swap them once."""
    read = needed("nudenet.nudenet", "nudity")._read_image
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(8, 8, 3).contiguous()
    return bool(read(red.numpy(), 8)[0][0, 0].max() > 0.5)
