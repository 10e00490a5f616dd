"""ResNet-50 on Imagenette's classes, on weights made here, against NumPy."""

from __future__ import annotations

import sys
import urllib.error

import numpy as np
import pytest
import torch
from torch.nn import functional

from ebu_optim.metrics import ImagenetteClassifier, imagenette_metrics
from ebu_optim.metrics.imagenette import CLASSES, METRICS, SYNSETS

models = pytest.importorskip(
    "torchvision.models", reason="torchvision comes with the extra text_to_image"
)

INDICES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Coloured patches, uint8, wider than high."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 6, generator=g)
    x[:, 0] *= 0.5  # no channel like another
    return (functional.interpolate(x, scale_factor=8) * 255).to(torch.uint8)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    """The preprocessing of IMAGENET1K_V2 as its documentation has it."""
    h, w = x.shape[2:]
    x = functional.interpolate(
        x.float(), (232, 232 * w // h), mode="bilinear", align_corners=False, antialias=True
    )
    x = x.round().clamp(0, 255) / 255
    left = (x.shape[3] - 224) // 2
    x = x[:, :, 4:228, left : left + 224]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (x - mean) / std


@pytest.fixture(scope="module")
def network():
    """A ResNet-50 that tells the pictures apart: random, its classes centred on them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.resnet50(weights=None).eval()
    with torch.no_grad():
        x = by_hand(pictures(6, seed=1))
        centred = model(x) - model.fc.bias
        model.fc.weight *= 4 / centred.sub(centred.mean(0)).std()
        model.fc.bias.zero_()
        model.fc.bias -= model(x).mean(dim=0)
    return model


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def probabilities(network, x, columns) -> np.ndarray:
    with torch.no_grad():
        logits = network(by_hand(x))[:, columns].double().numpy()
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("over", ["imagenet", "imagenette"])
def test_values_by_hand(network, weights, over):
    x = pictures(6)
    columns = list(range(1000)) if over == "imagenet" else INDICES
    p = probabilities(network, x, columns)
    entropies = -(p * np.log(p)).sum(1)
    top = p.argmax(1)
    # the first two are of the forgotten class, one of them so that it is right
    names = ["cassette player"] * 2 + ["tench", "church", "gas pump", "parachute"]
    asked = np.array([columns.index(INDICES[CLASSES.index(n)]) for n in names])
    found = imagenette_metrics(
        2 * x.float() / 255 - 1,
        names,
        ["cassette player"],
        over=over,
        weights_file=weights,
        noise_images=2,
        batch_size=4,
    )
    assert found["ce_f"]["value"] == pytest.approx(entropies[:2].mean(), rel=2e-3)
    assert found["ce_r"]["value"] == pytest.approx(entropies[2:].mean(), rel=2e-3)
    assert found["p_f"]["value"] == pytest.approx(p[:2, asked[0]].mean(), rel=2e-2)
    assert found["ra"]["value"] == (top[2:] == asked[2:]).mean()
    assert found["ua"]["value"] == (top[:2] != asked[:2]).mean()
    assert found["ra"]["n"] == 4
    assert set(found["ra"]) == {"value", "low", "high", "n", "noise"}
    assert found["not_computed"] is None
    assert found["protocol"]["over"] == over
    assert "resize_size=[232]" in found["protocol"]["preprocessing"]


def test_the_top_class_is_over_what_was_asked(network, weights):
    x = pictures(6)
    ten = probabilities(network, x, INDICES).argmax(1)
    labels = torch.from_numpy(ten)  # each image asked for what it is among the ten
    forget = [int(ten[0])]
    args = {"weights_file": weights, "noise_images": 1}
    found = imagenette_metrics(x, labels, forget, over="imagenette", **args)
    assert found["ua"]["value"] == 0
    assert found["ra"]["value"] == 1
    assert "base" not in found["ra"]
    base = {"base_images": x[1:], "base_labels": [CLASSES[i] for i in [ten[0], *ten[2:]]]}
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\)"):
        imagenette_metrics(x, labels, forget, base_images=x[1:], **args)
    found = imagenette_metrics(x, labels, forget, over="imagenette", **base, **args)
    assert found["ra"]["base"] == 1
    asked = [ten[0], *ten[2:]].count(ten[0])
    assert found["ua"]["base"] == (ten[0] != ten[1]) / asked
    # a random network's top class is one of the ten others' 990
    assert imagenette_metrics(x, labels, forget, **args)["ra"]["value"] < 1


def test_uint8_and_float_are_one_and_the_random_stream_is_left_alone(weights):
    state = torch.get_rng_state()
    judge = ImagenetteClassifier(over="imagenette", weights_file=weights, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    x = pictures(3)
    assert torch.equal(judge(x), judge(x.float() / 127.5 - 1))
    assert judge(x).shape == (3, 10)


def test_the_classes_are_those_of_the_data_set():
    names = models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert [names.index(c) for c in CLASSES] == INDICES
    assert list(SYNSETS) == sorted(SYNSETS)  # the order of folders, and so of labels
    datasets = pytest.importorskip("torchvision.datasets")
    known = datasets.Imagenette._WNID_TO_CLASS
    assert {wnid: synonyms[0] for wnid, synonyms in known.items()} == SYNSETS
    info = pytest.importorskip("timm.data", reason="timm comes with open_clip").ImageNetInfo()
    assert [info.index_to_label_name(i) for i in INDICES] == list(SYNSETS)


def test_weights_of_the_cache_and_none(weights, tmp_path, monkeypatch):
    def fetch(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    args = (pictures(2), ["tench", "church"], ["tench"])
    found = imagenette_metrics(*args, noise_images=1)
    assert [found[m] for m in METRICS] == [None] * 5
    assert found["not_computed"].startswith("not computed, because the weights resnet50-11ad3fa6")
    assert "Name or service not known" in found["not_computed"]
    assert "give weights_file=" in found["not_computed"]
    cached = tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth"
    cached.write_bytes(weights.read_bytes())
    assert imagenette_metrics(*args, noise_images=1)["not_computed"] is None
    cached.write_bytes(weights.read_bytes()[:1000])
    found = imagenette_metrics(*args, noise_images=1)
    assert f"{cached} is not a complete weights file" in found["not_computed"]


def test_without_torchvision_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as if not installed
    found = imagenette_metrics(pictures(2), [0, 1], [0])
    assert 'pip install "ebu_optim[text-to-image]"' in found["not_computed"]


def test_a_file_of_other_weights_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "w.pth"
    for state, message in (
        ({"fc.weight": Evil()}, "is not a complete weights file"),
        ({"state_dict": {"fc.weight": torch.ones(2)}}, "holds no state dict"),
        ({"fc.weight": torch.ones(2)}, "does not hold weights of ResNet: conv1.weight"),
        (models.resnet50(num_classes=10).state_dict(), r"fc.weight, which is \(1000, 2048\), is"),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            ImagenetteClassifier(weights_file=path)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(FileNotFoundError, match="weights_file: no file"):
        ImagenetteClassifier(weights_file=tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 3, 8, 8)}, r"images.*seem to be in \[0, 1\]"),
        ({"images": "folder"}, "images must be a tensor"),
        ({"labels": ["tench", "dog"]}, "labels must be numbers 0..9 or names.*'dog'"),
        ({"labels": [0, 10]}, "labels must be.*got 10"),
        ({"labels": [0]}, r"labels must have shape \(2,\)"),
        ({"forget": "tench"}, "forget must be numbers.*got 'tench'"),
        ({"over": "ten"}, "over must be one of"),
        ({"weights": "V3"}, "weights must be one of .*IMAGENET1K_V1"),
    ],
)
def test_bad_input_is_named(weights, change, message):
    args = {"images": pictures(2), "labels": [0, 1], "forget": [0], "weights_file": weights}
    with pytest.raises(ValueError, match=message):
        imagenette_metrics(**(args | change))
