"""The Frechet distance of features: the closed form, NumPy, and where features come from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ebu_optim.class_conditional import measured
from ebu_optim.metrics.frechet import classifier_features, classifier_frechet, frechet_distance
from ebu_optim.training import data


def numpy_frechet(a, b):
    """By the eigenvalues of the product, which are those that the trace of its root needs."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(s_a @ s_b).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * roots


def test_closed_form_where_covariances_commute():
    # axis-aligned crosses: mean 0, covariance diag(2 s^2 / 3)
    def cross(*widths):
        rows = torch.diag(torch.tensor(widths))
        return torch.cat([rows, -rows])

    a, b = cross(3.0, 1.0), cross(1.0, 2.0) + torch.tensor([4.0, 0.0])
    s = (2 / 3) ** 0.5
    assert frechet_distance(a, b) == pytest.approx(16 + s**2 * ((3 - 1) ** 2 + (2 - 1) ** 2))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_against_numpy_on_correlated_features(scale):
    g = torch.Generator().manual_seed(0)
    a = scale * (torch.randn(60, 5, generator=g) @ torch.randn(5, 5, generator=g))
    b = scale * (torch.randn(40, 5, generator=g) @ torch.randn(5, 5, generator=g) + 1)
    assert frechet_distance(a, b) == pytest.approx(numpy_frechet(a, b), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_equal_sets_and_fewer_images_than_features():
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    # roots of rounded zeros: 50 of them, each at most 1e-8
    assert frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + 2) == pytest.approx(50 * 4, rel=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(self.drop(self.act(self.conv(x)).flatten(1)))


def test_features_of_the_last_linear_or_of_a_layer():
    net, x = Net().train(), torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        conv = net.conv(x)
    found = classifier_features(net, x, batch_size=3)
    torch.testing.assert_close(found, conv.relu().flatten(1))
    assert net.training
    # not what the in-place ReLU behind it leaves
    found = classifier_features(net, x, layer=net.conv, batch_size=3)
    torch.testing.assert_close(found, conv.flatten(1))
    y = torch.randn(9, 1, 8, 8)
    assert classifier_frechet(net, x, y) == pytest.approx(
        numpy_frechet(classifier_features(net, x), classifier_features(net, y)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.zeros(3), torch.zeros(3, 2)), r"a must have shape \(n, d"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.zeros(1, 2)), "b must .* at least 2"),
        (lambda: frechet_distance(torch.zeros(3, 2), torch.zeros(3, 4)), "a has 2 features and b"),
        (lambda: frechet_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2)), "a holds NaN"),
        (lambda: classifier_features(nn.Flatten(), torch.zeros(2, 1, 2, 2)), "has no nn.Linear"),
        (
            lambda: classifier_features(Net(), torch.zeros(2, 1, 8, 8), layer=nn.ReLU()),
            "layer was run for 0 of 2 images",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_evaluation_reads_the_real_images_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Linear(5, 3))
    ours, real = torch.rand(8, 3, 2, 2), torch.randint(256, (30, 3, 2, 2), dtype=torch.uint8)
    held = data.Data(real, torch.arange(30) % 3, ("a", "b", "c"), "random")
    args = SimpleNamespace(samples=tmp_path, fid=False)
    kept = torch.ones(8, dtype=torch.bool)
    given = args, net, ours, torch.zeros(8), kept, [0], held
    first = measured.quality(*given)["classifier_frechet"]
    theirs = data.to_float(real[held.labels != 0])
    assert first == pytest.approx(classifier_frechet(net, ours, theirs), rel=1e-12)
    seen = []
    features = measured.classifier_features
    monkeypatch.setattr(
        measured, "classifier_features", lambda judge, x: seen.append(len(x)) or features(judge, x)
    )
    assert measured.quality(*given)["classifier_frechet"] == first
    assert seen == [8]
    with torch.no_grad():
        net[1].weight.mul_(2)  # another judge has its own
    measured.quality(*given)
    assert seen == [8, 8, 20]
