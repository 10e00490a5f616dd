"""LPIPS by its authors' package on backbones whose weights are made here, against its formula."""

from __future__ import annotations

import socket
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from PIL import Image

from ebu_optim.metrics import lpips_distance

package = pytest.importorskip("lpips", reason="lpips comes with the extra text_to_image")
from torchvision import models  # noqa: E402  (a requirement of lpips)

# the modules of torchvision's `features` whose outputs are compared
NETS = {
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """net -> torchvision's features, and a file of them alone."""
    folder, found = tmp_path_factory.mktemp("lpips"), {}
    for net, (name, _) in NETS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            features = getattr(models, name)(weights=None).features.eval()
        state = {f"features.{k}": v for k, v in features.state_dict().items()}
        torch.save(state, folder / f"{net}.pth")
        found[net] = features, folder / f"{net}.pth"
    return found


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """uint8, wider than high."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 6, generator=g)
    x[:, 2] *= 0.3  # no channel like another
    return (torch.nn.functional.interpolate(x, scale_factor=14) * 255).to(torch.uint8)


@torch.no_grad()
def by_hand(net: str, features, x: torch.Tensor, y: torch.Tensor) -> list[float]:
    file = Path(package.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    linear = torch.load(file, map_location="cpu", weights_only=True)
    # ImageNet's mean and deviation, seen from [-1, 1], as the package rounds them
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[..., None, None]
    a, b = ((p.float() / 127.5 - 1 - shift) / scale for p in (x, y))
    distance, layer = torch.zeros(len(x)), 0
    for i, module in enumerate(features[: NETS[net][1][-1] + 1]):
        a, b = module(a), module(b)
        if i in NETS[net][1]:
            unit_a, unit_b = (f / f.square().sum(1, keepdim=True).sqrt() for f in (a, b))
            weight = linear[f"lin{layer}.model.1.weight"]
            distance += ((unit_a - unit_b).nan_to_num() ** 2 * weight).sum(1).mean((1, 2))
            layer += 1
    return distance.tolist()


@pytest.mark.parametrize("net", NETS)
def test_values_by_hand(backbones, net):
    features, weights = backbones[net]
    x, y = pictures(3), pictures(3, seed=1)
    state = torch.get_rng_state()
    found = lpips_distance(x.float() / 127.5 - 1, y, net=net, weights_file=weights, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)  # the user's random stream
    expected = by_hand(net, features, x, y)
    assert min(expected) > 1e-3
    assert found["per_image"] == pytest.approx(expected, rel=1e-3)
    assert found["lpips"]["value"] == pytest.approx(sum(expected) / 3, rel=1e-3)
    assert found["lpips"]["low"] <= found["lpips"]["value"] <= found["lpips"]["high"]
    assert found["protocol"]["network"] == f"{net}, linear weights v0.1"
    assert found["not_computed"] is None
    same = lpips_distance(x, x, net=net, weights_file=weights)
    assert same["per_image"] == [0, 0, 0]


def test_brought_to_a_size_as_pil_does_it(backbones, tmp_path):
    features, weights = backbones["alex"]
    pairs = []
    for name, x in (("a", pictures(2)), ("b", pictures(2, seed=1))):
        (tmp_path / name).mkdir()
        small = []
        for i, p in enumerate(x):
            image = Image.fromarray(p.permute(1, 2, 0).numpy())
            image.save(tmp_path / name / f"{i}.png")
            image = image.resize((42, 35), Image.Resampling.BILINEAR)
            data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            small.append(data.view(35, 42, 3).permute(2, 0, 1))
        pairs.append(torch.stack(small))
    found = lpips_distance(tmp_path / "a", tmp_path / "b", weights_file=weights, size=35)
    assert found["per_image"] == pytest.approx(by_hand("alex", features, *pairs), rel=2e-2)
    assert found["protocol"]["size"] == 35
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    with pytest.raises(ValueError, match=r"1.png would pair with 2.png"):
        lpips_distance(tmp_path / "a", tmp_path / "b", weights_file=weights)


def test_no_weights_no_figure(monkeypatch, tmp_path):
    def fetch(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    found = lpips_distance(pictures(2), pictures(2))
    assert found["lpips"] is found["per_image"] is None
    assert "the weights alexnet-owt-7be5be79.pth could not be downloaded" in found["not_computed"]


def test_a_download_ends_when_nothing_comes_or_the_network_is_off(monkeypatch, tmp_path):
    limits = []

    def fetch(*_args, **_kwargs):
        limits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert "(timed out)" in lpips_distance(pictures(2), pictures(2))["not_computed"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "(HF_HUB_OFFLINE is set)" in lpips_distance(pictures(2), pictures(2))["not_computed"]
    assert limits == [30]
    assert socket.getdefaulttimeout() is None


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if not installed
    found = lpips_distance(pictures(2), pictures(2))
    assert 'pip install "ebu_optim[text-to-image]"' in found["not_computed"]


def test_other_weights_are_refused(backbones):
    with pytest.raises(ValueError, match="does not hold weights of alexnet"):
        lpips_distance(pictures(2), pictures(2), weights_file=backbones["squeeze"][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 3, 70, 84)}, r"images.*seem to be in \[0, 1\]"),
        ({"images": pictures(3)}, r"must pair up; got \(3, 3, 70, 84\) and \(2, 3, 70, 84\)"),
        ({"net": "resnet"}, "net must be one of"),
        ({"size": 30}, "size: 'alex' needs a side of at least 31 pixels; got 30"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        lpips_distance(**({"images": pictures(2), "reference": pictures(2)} | change))
