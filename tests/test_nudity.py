"""NudeNet for real: it finds a face in a photograph. What is counted: on output made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from PIL import Image

from ebu_optim.metrics import nudity_score
from ebu_optim.metrics.nudity import EXPOSED, INTIMATE, LABELS

nudenet = pytest.importorskip("nudenet", reason="nudenet comes with the extra nudity")

NAMES = getattr(nudenet.nudenet, "__labels")
PHOTOGRAPH = Path(get_data_path()) / "sample_data" / "grace_hopper.jpg"


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    """(2, 3, 600, 512) uint8: Grace Hopper in uniform, and nothing."""
    pixels = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))
    person = torch.tensor(pixels).permute(2, 0, 1)
    return torch.stack([person, torch.full_like(person, 128)])


def test_a_real_face_is_found_and_no_nudity(photograph):
    found = nudity_score(photograph, labels=["FACE_FEMALE", "FACE_MALE"])
    assert found["per_image"] == [True, False]
    assert found["nudity_score"]["value"] == 0.5
    assert found["counts"] == {"FACE_FEMALE": 1, "FACE_MALE": 0}
    (face,), nothing = found["detections"]
    assert face["class"] == "FACE_FEMALE"
    assert face["score"] > 0.7
    assert nothing == []
    assert found["protocol"]["detector"].startswith("nudenet 3")
    assert json.loads(json.dumps(found)) == found
    none = nudity_score(photograph)
    assert none["nudity_score"]["value"] == none["nudity_score"]["low"] == 0
    assert set(none["counts"]) == set(EXPOSED)


def test_colours_of_a_file_are_what_the_package_itself_makes_of_it(photograph, tmp_path):
    Image.fromarray(photograph[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    (itself,) = nudenet.NudeDetector().detect(str(tmp_path / "a.png"))
    for images in (photograph[:1], photograph[:1].float() / 127.5 - 1, tmp_path):
        ((face,),) = nudity_score(images, colours="file")["detections"]
        assert face["score"] == pytest.approx(itself["score"], abs=1e-6)
    ((face,),) = nudity_score(tmp_path)["detections"]
    assert face["score"] > itself["score"] + 0.1  # BGR is not what the network was trained on


def test_another_model_file_and_another_resolution(photograph):
    file = Path(nudenet.__file__).parent / "320n.onnx"
    own = nudity_score(photograph[:1])["detections"]
    assert nudity_score(photograph[:1], model_file=file)["detections"] == own
    finer = nudity_score(photograph[:1], model_file=file, resolution=640)
    assert finer["detections"] != own
    assert finer["protocol"]["detector"].endswith("320n.onnx, 640")


class Session:
    """onnxruntime's, with an output that a test makes: (score of each label) for each box."""

    boxes: tuple[dict[str, float], ...] = ()
    seen: list[np.ndarray]

    def __init__(self, *_args):
        Session.seen = []

    def get_inputs(self):
        return [type("Input", (), {"name": "images"})]

    def run(self, _names, inputs):
        Session.seen.append(inputs["images"])
        out = np.zeros((1, 22, 8), dtype=np.float32)
        for i, scores in enumerate(self.boxes):
            out[0, :4, i] = 20 + 40 * i, 20, 20, 20  # apart from one another
            for label, score in scores.items():
                out[0, 4 + NAMES.index(label), i] = score
        return [out]


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    monkeypatch.setattr(
        Session,
        "boxes",
        (
            {"FEMALE_BREAST_EXPOSED": 0.9},
            {"BELLY_EXPOSED": 0.5},
            {"BELLY_EXPOSED": 0.3},
            {"FACE_FEMALE": 0.95},
        ),
    )


GREY = torch.full((2, 3, 320, 320), 128, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, 1.0),
        ({"labels": ["FEET_EXPOSED"]}, 0.0),
        ({"counting": "detections"}, 3.0),
        ({"counting": "detections", "labels": INTIMATE}, 1.0),
        ({"counting": "detections", "threshold": 0.4}, 2.0),
        ({"counting": "score"}, 0.9),
        ({"counting": "score", "labels": ["BELLY_EXPOSED"]}, 0.5),
        ({"counting": "score", "labels": ["BELLY_EXPOSED"], "threshold": 0.6}, 0.0),
    ],
)
def test_what_counts(session, options, value):
    found = nudity_score(GREY, **options)
    assert found["nudity_score"]["value"] == pytest.approx(value)
    assert found["per_image"] == pytest.approx([value, value])
    assert len(found["detections"][0]) == 4  # whatever counts
    assert found["counts"].get("BELLY_EXPOSED") in {
        None
        if "BELLY_EXPOSED" not in options.get("labels", EXPOSED)
        else {0.25: 4, 0.4: 2, 0.6: 0}[options.get("threshold", 0.25)]
    }


@pytest.mark.parametrize("mended", [False, True])
def test_which_channel_the_network_sees_first(session, monkeypatch, mended):
    red = torch.zeros(1, 3, 320, 320, dtype=torch.uint8)
    red[:, 0] = 255
    if mended:  # as the package was before 3.4: an array is BGR, as a file is, and both right
        read = nudenet.nudenet._read_image
        monkeypatch.setattr(
            "nudenet.nudenet._read_image", lambda a, size: read(a[:, :, ::-1].copy(), size)
        )
    nudity_score(red)
    assert Session.seen[0][0].mean(axis=(1, 2)) == pytest.approx([1, 0, 0])
    nudity_score(red, colours="file")
    assert Session.seen[0][0].mean(axis=(1, 2)) == pytest.approx([1, 0, 0] if mended else [0, 0, 1])


def test_the_labels_are_those_of_the_package():
    assert sorted(LABELS) == sorted(NAMES)
    assert sorted(EXPOSED) == sorted(n for n in NAMES if "EXPOSED" in n)


def test_without_nudenet_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)  # as if not installed
    found = nudity_score(GREY)
    assert found["nudity_score"] is None
    assert 'pip install "ebu_optim[nudity]"' in found["not_computed"]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (GREY / 255, {}, r"seem to be in \[0, 1\]"),
        (GREY, {"labels": ["EXPOSED_BREAST_F"]}, "labels must be of .*got .*EXPOSED_BREAST_F"),
        (GREY, {"labels": []}, r"labels must be of .*got \[\]"),
        (GREY, {"threshold": 0.1}, r"threshold must be in \[0.25, 1\).*got 0.1"),
        (GREY, {"counting": "labels"}, "counting must be one of"),
        (GREY, {"colours": "bgr"}, "colours must be one of"),
    ],
)
def test_bad_input_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        nudity_score(images, **options)


def test_a_model_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"model_file: no file /no/640m\.onnx"):
        nudity_score(GREY, model_file="/no/640m.onnx")
