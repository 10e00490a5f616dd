"""Intervals, and the classifier metrics with what noise and the base model score."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from ebu_optim.metrics import accuracy, classifier_metrics, entropy, probability
from ebu_optim.metrics.intervals import bootstrap, t_interval, wilson


def test_t_interval_by_the_table_of_student():
    # t(0.975, 4) = 2.776, s = sqrt(2.5)
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * 2.5**0.5 / 5**0.5
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    for bad in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="at least two finite numbers"):
            t_interval(bad)


def test_wilson_by_known_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(5, 5)[1] == 1.0


def test_bootstrap_is_the_normal_interval_where_that_holds_and_repeats():
    x = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    low, high = bootstrap(x)
    assert torch.equal(torch.get_rng_state(), state)
    half = 1.96 * float(x.std()) / math.sqrt(len(x))
    assert low == pytest.approx(float(x.mean()) - half, abs=half / 10)
    assert high == pytest.approx(float(x.mean()) + half, abs=half / 10)
    assert bootstrap(x) == (low, high)
    assert bootstrap(torch.tensor([0.25])) == (0.25, 0.25)


class Judge(nn.Module):
    """Reads the logits off the first pixels."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return 4 * x.flatten(1)[:, : self.classes]


def example():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 2, 4, generator=g) * 2 - 1
    return images, torch.arange(40) % 5


def test_values_are_those_of_the_single_metrics():
    images, labels = example()
    base = images.flip(0)
    found = classifier_metrics(
        Judge(5), images, labels, [1, 3], reject=Judge(6), base_images=base, num_classes=5
    )
    f = (labels == 1) | (labels == 3)
    for part, x in (("value", images), ("base", base)):
        for ending, k in (("", 5), ("_reject", 6)):
            logits = Judge(k)(x)
            p = [probability(logits[labels == c], c) for c in (1, 3)]
            assert found["p_f" + ending][part] == pytest.approx(sum(p) / 2)
            assert found["ra" + ending][part] == pytest.approx(accuracy(logits[~f], labels[~f]))
            assert found["ua" + ending][part] == pytest.approx(1 - accuracy(logits[f], labels[f]))
        logits = Judge(5)(x)
        assert found["ce_f"][part] == pytest.approx(entropy(logits[f]))
        assert found["ce_r"][part] == pytest.approx(entropy(logits[~f]))
    assert set(found) == {"ce_f", "ce_r", "p_f", "ua", "ra", "p_f_reject", "ua_reject", "ra_reject"}
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"]
    assert (found["ua"]["low"], found["ua"]["high"]) == wilson(round(16 * found["ua"]["value"]), 16)
    assert found["ra"]["n"] == 24
    assert json.loads(json.dumps(found)) == found


def test_noise_is_the_surrogate_cut_to_what_samples_can_be():
    seen = []

    def judge(x):
        seen.append(x)
        return torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(len(x), 3)

    images = torch.zeros(8, 1, 2, 2)
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2])
    found = classifier_metrics(judge, images, labels, [0, 1], surrogate="gaussian")
    noise = torch.cat([x for x in seen if x.std() > 0])
    assert len(noise) == 2000
    assert noise.max() == 1.0
    assert (noise == 1).float().mean() == pytest.approx(0.1587, abs=0.02)
    # one image of class 0 and three of class 1: weights 1/4 and 3/4
    assert found["p_f"]["noise"] == pytest.approx(0.5 / 4 + 0.3 * 3 / 4)
    assert found["ua"]["noise"] == pytest.approx(1 - 1 / 4)
    assert found["ra"]["noise"] == 0.0
    assert found["ce_f"]["noise"] == pytest.approx(entropy(judge(images)))
    assert "base" not in found["p_f"]
    assert found == classifier_metrics(judge, images, labels.int(), [0, 1], surrogate="gaussian")


IMAGES, LABELS = example()


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Judge(5), IMAGES, LABELS, []), {}, "forget must name at least one class"),
        ((Judge(5), IMAGES, LABELS.float(), [2]), {}, r"labels must be whole.*torch\.float32"),
        ((Judge(5), IMAGES, LABELS, [7]), {}, r"forget names \[7\], of which there is no image"),
        ((Judge(5), IMAGES, LABELS, range(5)), {}, "RA and CE_r need images of kept classes"),
        ((Judge(5), IMAGES, LABELS[:3], [0]), {}, "one per image"),
        ((Judge(4), IMAGES, LABELS, [0]), {}, r"0\.\.3, the classifier's classes; got 0\.\.4"),
        ((Judge(7), IMAGES, LABELS, [0]), {"num_classes": 5}, "classifier gives .* 5 classes"),
        (
            (Judge(5), IMAGES, LABELS, [0]),
            {"num_classes": 5, "reject": Judge(5)},
            "reject gives .* 6 classes were expected",
        ),
        ((Judge(5), IMAGES, LABELS, [0]), {"confidence": 95}, r"confidence must be in \(0, 1\)"),
    ],
)
def test_bad_input_is_named(args, options, message):
    with pytest.raises(ValueError, match=message):
        classifier_metrics(*args, **options)


def test_bad_intervals_are_named():
    with pytest.raises(ValueError, match="hits=3, n=2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="one per image"):
        bootstrap(torch.zeros(0))
    with pytest.raises(ValueError, match="resamples"):
        bootstrap(torch.zeros(2), resamples=0)
