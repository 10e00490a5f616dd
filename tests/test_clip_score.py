"""CLIP score: open_clip's real path on a tiny model whose weights are made here, against NumPy."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ebu_optim.metrics import ClipClassifier, clip_score

pytest.importorskip("open_clip", reason="open_clip comes with the extra text_to_image")

from .clip import NAME, by_hand, random_weights

PROMPTS = ["a cassette player", "a church", "a person", "a photo of a church at night", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of weights: ±the text projection."""
    folder = tmp_path_factory.mktemp("clip")
    random_weights(folder / "plus.pt")
    state = torch.load(folder / "plus.pt", weights_only=True)
    state["text_projection"] *= -1
    torch.save(state, folder / "minus.pt")
    return folder


def test_a_classifier_of_texts_is_their_cosines(folder):
    x, texts = pictures(3), PROMPTS[:2]
    found = ClipClassifier(texts, model=NAME, pretrained=folder / "plus.pt")(x)
    expected = [100 * by_hand(x, [t] * 3, folder / "plus.pt") for t in texts]
    np.testing.assert_allclose(found.numpy(), np.stack(expected, 1), rtol=1e-3, atol=1e-3)
    assert ClipClassifier(texts, model=NAME, pretrained=folder / "minus.pt")(x).shape == (3, 2)


def pictures(n: int = 5) -> torch.Tensor:
    """uint8, wider than high."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 4, 6, generator=g)
    x[:, 2] *= 0.3  # no channel like another
    return (torch.nn.functional.interpolate(x, scale_factor=10) * 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["plus.pt", "minus.pt"])
def test_values_by_hand_on_every_scale(folder, name):
    x = pictures()
    cosines = by_hand(x, PROMPTS, folder / name)
    assert cosines.std() > 0.01  # which image and which prompt matters
    state = torch.get_rng_state()
    args = {"model": NAME, "pretrained": folder / name, "batch_size": 2}
    for scale, expected in (
        ("cosine", cosines),
        ("x100", 100 * cosines),
        ("w2.5", 2.5 * np.maximum(cosines, 0)),
    ):
        found = clip_score(x, PROMPTS, scale=scale, **args)
        assert found["per_image"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert found["clip_score"]["value"] == pytest.approx(expected.mean(), rel=1e-3, abs=1e-5)
        assert found["clip_score"]["low"] <= found["clip_score"]["value"]
        assert found["clip_score"]["n"] == 5
        assert found["protocol"]["scale"] == scale
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream
    assert found["protocol"]["weights"] == name
    assert found["protocol"]["preprocessing"]["interpolation"] == "bicubic"
    assert json.loads(json.dumps(found)) == found


def test_one_prompt_for_all_images_of_a_folder(folder, tmp_path):
    x = pictures(3)
    for i, picture in enumerate(x):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    found = clip_score(tmp_path, "a church", model=NAME, pretrained=folder / "plus.pt")
    expected = by_hand(x, ["a church"] * 3, folder / "plus.pt")
    assert found["per_image"] == pytest.approx(expected, rel=1e-3)
    assert found["protocol"]["prompts"] == "1 for 3 images"


def test_no_weights_no_figure(monkeypatch):
    def fetch(*_args, **_kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("open_clip.factory.download_pretrained", fetch)
    found = clip_score(pictures(2), "a church")
    assert found["clip_score"] is found["per_image"] is None
    assert found["not_computed"].startswith("not computed, because the CLIP weights 'openai' of")
    assert "give pretrained= the path" in found["not_computed"]


def test_without_open_clip_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if not installed
    found = clip_score(pictures(2), "a church")
    assert 'pip install "ebu_optim[text-to-image]"' in found["not_computed"]


def test_a_file_of_other_weights_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    for content in ({"w": torch.ones(1)}, {"w": Evil()}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"other.pt does not hold weights of {NAME}"):
            clip_score(pictures(2), "x", model=NAME, pretrained=tmp_path / "other.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 3, 8, 8)}, r"images.*seem to be in \[0, 1\]"),
        ({"images": pictures(0)}, "at least 1 image; got 0"),
        ({"prompts": ["a", "b", "c"]}, "prompts must be one .*per image, 2; got 3"),
        ({"scale": "w"}, "scale must be one of"),
        ({"model": "ViT-B/32"}, "model must be in .*'ViT-B-32'"),
        ({"pretrained": "laion"}, "pretrained must be a weights file or a tag .*'openai'"),
        ({"model": "ViT-B-32"}, "another activation .*give model='ViT-B-32-quickgelu'"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        clip_score(**({"images": pictures(2), "prompts": "a church"} | change))
