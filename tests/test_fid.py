"""FID and KID: torch-fidelity's real path on weights made here, against NumPy."""

from __future__ import annotations

import errno
import json
import sys
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from ebu_optim.metrics.fid import fid
from ebu_optim.metrics.images import RGBImages

pytest.importorskip("torch_fidelity", reason="torch-fidelity comes with the extra metrics")

from .inception import MODULE, features, frechet, mmd2, random_weights

URL = "https://example.invalid/weights-test.pth"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return random_weights(tmp_path_factory.mktemp("inception") / "random.pth")


def pictures(n: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth patches, uint8."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, 4, 4, generator=g)
    return (torch.nn.functional.interpolate(x, scale_factor=2) * 255).to(torch.uint8)


def measure(x, y, weights, **options):
    options = {"feature_layer": "64", "reference_split": "test", **options}
    return fid(x, y, inception_weights=weights, **options)


@pytest.mark.slow
def test_values_by_hand_and_the_label_of_another_layer(weights):
    x, y = pictures(20), pictures(17, seed=1) // 2
    state = torch.get_rng_state()
    found = measure(x, y, weights, kid_subset_size=17, kid_subsets=3)
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream
    assert "fid" not in found  # layer 64 is no FID
    a, b = features(x, weights, "64"), features(y, weights, "64")
    assert found["frechet_64"] == pytest.approx(frechet(a, b), rel=1e-4)
    # each subset is all of y and 17 of the 20 of x
    rng = np.random.RandomState(2020)
    subsets = [
        mmd2(a[rng.choice(20, 17, replace=False)], b[rng.choice(17, 17, replace=False)])
        for _ in range(3)
    ]
    assert found["kernel_64_mean"] == pytest.approx(np.mean(subsets), rel=1e-3)
    assert found["kernel_64_std"] == pytest.approx(np.std(subsets), rel=2e-2, abs=1e-7)
    assert found["not_computed"] is None
    assert found["protocol"]["weights"] == "random.pth"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_the_real_layer_is_fid(weights):
    x = pictures(4)
    found = fid(x, x // 3, reference_split="test", inception_weights=weights)
    assert found["fid"] > 1
    assert found["protocol"]["layer"] == "2048"
    assert found["protocol"]["kid_subset_size"] == 2


def test_every_way_to_give_the_same_images_gives_the_same(weights, tmp_path):
    gray, other = pictures(6, channels=1), pictures(6, seed=3)
    reference = measure(gray.expand(-1, 3, -1, -1), other, weights)
    as_float = gray.float() / 127.5 - 1
    for i, x in enumerate(gray):
        folder = tmp_path / "gray" / f"{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0].numpy()).save(folder / f"{i // 3}.png")
    order = [i for c in range(3) for i in range(c, 6, 3)]  # as the folder is sorted
    assert torch.equal(
        torch.stack(list(RGBImages(tmp_path / "gray", "images", "raise"))),
        gray[order].expand(-1, 3, -1, -1),
    )
    for given in (gray, as_float, as_float.double(), tmp_path / "gray"):
        found = measure(given, other, weights, kid_subset_size=6, kid_subsets=1)
        assert found["frechet_64"] == pytest.approx(reference["frechet_64"], rel=1e-3)
    same = measure(gray, gray, weights, kid_subset_size=6, kid_subsets=1)
    assert abs(same["frechet_64"]) < 1e-3 < reference["frechet_64"]


def test_forgotten_classes_are_left_out_of_both_sets(weights):
    x, y = pictures(18), pictures(24, seed=1)
    labels, reference_labels = torch.arange(18) % 3, torch.arange(24) % 4
    spoiled = x.clone()
    spoiled[labels == 1] = 255
    wanted = measure(x[labels != 1], y[reference_labels != 1], weights)
    found = measure(
        spoiled, y, weights, labels=labels, reference_labels=reference_labels, forget=[1]
    )
    assert found["frechet_64"] == wanted["frechet_64"]
    assert found["protocol"]["left_out"] == [1]
    assert found["protocol"]["images"] == 12
    assert found["protocol"]["reference_images"] == 18


def test_unreadable_files_are_named_and_counted_or_left_out(weights, tmp_path):
    for i, x in enumerate(pictures(6)):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "6.jpg").write_text("no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    with pytest.raises(ValueError, match=r'2 of 7 files .*5\.png .*6\.jpg .*unreadable="skip"'):
        measure(tmp_path, pictures(6), weights)
    found = measure(tmp_path, pictures(6), weights, unreadable="skip")
    assert found["protocol"]["images"] == 5
    assert [s.split()[0] for s in found["skipped"]["images"]] == ["5.png", "6.jpg"]
    Image.new("RGB", (9, 8)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match=r"several sizes.*8x8.*9x8"):
        measure(tmp_path, pictures(6), weights, unreadable="skip")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch's cache, empty, and torch-fidelity's address."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(f"{MODULE}.URL_INCEPTION_V3", URL)
    return tmp_path / "hub" / "checkpoints" / "weights-test.pth"


def downloads(monkeypatch, content):
    def fetch(url, dst, progress):
        assert url == URL
        if isinstance(content, Exception):
            raise content
        with open(dst, "wb") as f:
            f.write(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (urllib.error.URLError("Name or service not known"), "Name or service not known"),
        (OSError(errno.ENOSPC, "No space left on device"), "space"),
    ],
)
def test_no_weights_no_figure(hub, monkeypatch, error, said):
    downloads(monkeypatch, error)
    found = fid(pictures(4), pictures(4), reference_split="test")
    assert found["fid"] is found["kid_mean"] is found["kid_std"] is None
    assert found["not_computed"].startswith("not computed, because the Inception weights could")
    assert said in found["not_computed"]
    assert str(hub) in found["not_computed"]


def test_a_download_that_ends_early_is_not_kept_and_a_whole_one_is(hub, monkeypatch, weights):
    whole = weights.read_bytes()
    downloads(monkeypatch, whole[: len(whole) // 2])
    args = {"reference_split": "test", "feature_layer": "64"}
    found = fid(pictures(4), pictures(4), **args)
    assert "is not a complete weights file" in found["not_computed"]
    assert list(hub.parent.iterdir()) == []
    downloads(monkeypatch, whole)
    assert fid(pictures(4), pictures(4), **args)["not_computed"] is None
    assert hub.read_bytes() == whole
    downloads(monkeypatch, AssertionError("it is there"))
    assert fid(pictures(4), pictures(4), **args)["not_computed"] is None
    hub.write_bytes(whole[:1000])
    found = fid(pictures(4), pictures(4), **args)
    assert "delete it, and it is downloaded again" in found["not_computed"]


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if not installed
    found = fid(pictures(4), pictures(4), reference_split="test")
    assert 'pip install "ebu_optim[metrics]"' in found["not_computed"]


def test_a_weights_file_is_never_unpickled_freely(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="is not a complete weights file"):
        measure(pictures(4), pictures(4), tmp_path / "evil.pth")
    assert not (tmp_path / "owned").exists()
    torch.save({"w": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold weights of torch-fidelity's"):
        measure(pictures(4), pictures(4), tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="inception_weights: no file"):
        measure(pictures(4), pictures(4), tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(4, 8, 8), {}, r"shape \(n, C, H, W\)"),
        (torch.zeros(4, 2, 8, 8), {}, "C of 1 or 3"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), {}, "torch.int64"),
        (torch.rand(4, 3, 8, 8), {}, r"seem to be in \[0, 1\]"),
        (torch.rand(4, 3, 8, 8) * 255 - 1, {}, r"must be in \[-1, 1\]; these reach"),
        (torch.full((4, 3, 8, 8), torch.nan), {}, "reach from nan"),
        (pictures(1), {}, "at least 2 images"),
        ("/no/such/folder", {}, "no folder /no/such/folder"),
        (pictures(4), {"feature_layer": "pool"}, "feature_layer must be one of"),
        (pictures(4), {"kid_subset_size": 1000}, r"kid_subset_size must be in 2\.\.4"),
        (pictures(4), {"unreadable": "ignore"}, "unreadable must be"),
        (pictures(4), {"device": "meta"}, "device must be cpu or cuda"),
        (pictures(4), {"forget": [1]}, r"labels must have shape \(4,\)"),
        (pictures(4), {"forget": [1], "labels": torch.zeros(3)}, r"got \(3,\)"),
        (".", {"forget": [1], "labels": torch.zeros(3)}, "images is a folder"),
    ],
)
def test_bad_input_is_named(images, options, message):
    with pytest.raises(ValueError, match=message):
        fid(images, pictures(4), reference_split="test", **options)


@pytest.mark.slow
def test_images_of_prompts_need_no_labels(weights):
    """uint8 at Stable Diffusion's size, asked for by prompts: nothing is left out."""
    x = pictures(3).repeat_interleave(64, dim=2).repeat_interleave(64, dim=3)
    assert x.shape == (3, 3, 512, 512)
    found = measure(x, 255 - x, weights)
    assert found["frechet_64"] > 0.01
    assert found["protocol"]["images"] == 3
    assert found["protocol"]["left_out"] == []
    assert measure(x.float() / 127.5 - 1, 255 - x, weights)["frechet_64"] == found["frechet_64"]
