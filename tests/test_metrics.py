"""CE, RA, UA, P_f by hand, and the two attacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ebu_optim.metrics import accuracy, classify, entropy, probability
from ebu_optim.metrics.depth import condition_replaced, learn_embedding, relearn

from .models import schedule, tiny_unet


def test_entropy_by_hand_in_nats():
    uniform = torch.zeros(3, 10)
    assert entropy(uniform) == pytest.approx(math.log(10))
    half = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert entropy(half) == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.cat([half, torch.zeros(1, 3)])) == pytest.approx(
        (1.5 * math.log(2) + math.log(3)) / 2
    )


def test_entropy_has_no_nan_where_probabilities_underflow():
    assert entropy(torch.tensor([[1e5, 0.0, -1e5]])) == 0.0
    assert entropy(torch.tensor([[0.0, -math.inf]])) == 0.0
    assert entropy(torch.tensor([[60000.0, 60000.0]], dtype=torch.float16)) == pytest.approx(
        math.log(2)
    )


def test_accuracy_and_probability_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]]))
    assert accuracy(logits, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert probability(logits, 1) == pytest.approx((0.2 + 0.3 + 0.5) / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_no_result(bad):
    logits = torch.tensor([[bad, 1.0]])
    for metric in (entropy, lambda x: accuracy(x, torch.tensor([0])), lambda x: probability(x, 0)):
        with pytest.raises(ValueError, match="NaN or"):
            metric(logits)


def test_classify_casts_to_the_classifier_and_keeps_each_modules_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9).eval(), nn.Linear(4, 3)).bfloat16().train()
    model[1].eval()
    assert classify(model, torch.randn(2, 1, 2, 2)).dtype == torch.float32
    assert [m.training for m in model] == [True, False, True]


def test_classify_batches_in_eval_mode_and_restores_the_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x = torch.randn(7, 1, 2, 2)
    logits = classify(model, x, batch_size=3)
    assert model.training
    torch.testing.assert_close(logits, model.eval()(x).detach())
    assert torch.equal(classify(lambda b: b.flatten(1), x), x.flatten(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entropy(torch.zeros(3)), r"shape \(n, K\)"),
        (lambda: entropy(torch.zeros(0, 3)), "n > 0"),
        (lambda: accuracy(torch.zeros(2, 3), torch.tensor([0])), "one per image"),
        (lambda: accuracy(torch.zeros(1, 3), torch.tensor([3])), r"0\.\.2"),
        (lambda: probability(torch.zeros(1, 3), 3), r"target must be in 0\.\.2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_replaced_condition_reaches_every_sample_and_ends_with_the_block():
    model = tiny_unet()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    row = model.class_embedding.weight[3].detach().clone()
    expected = model(x, t, class_labels=torch.tensor([3, 3])).sample
    clean = model(x, t, class_labels=torch.tensor([0, 1])).sample
    with condition_replaced(model.class_embedding, row):
        torch.testing.assert_close(model(x, t, class_labels=torch.tensor([0, 1])).sample, expected)
    assert torch.equal(model(x, t, class_labels=torch.tensor([0, 1])).sample, clean)
    with condition_replaced(model.class_embedding, row, null=1):  # guidance keeps its null branch
        found = model(x, t, class_labels=torch.tensor([0, 1])).sample
    torch.testing.assert_close(found, torch.stack([expected[0], clean[1]]))


def test_attacks_learn_and_leave_the_model_alone():
    model = tiny_unet()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    images = torch.full((8, 1, 8, 8), 0.5)
    args = {"steps": 5, "batch_size": 4}
    vector = learn_embedding(model, model.class_embedding, images, schedule(), **args)
    again = learn_embedding(model, model.class_embedding, images, schedule(), **args)
    assert torch.equal(vector, again)
    assert not torch.allclose(vector, model.class_embedding.weight.mean(0))
    student = relearn(model, images, 2, schedule(), **args)
    assert not student.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    moved = [not torch.equal(p, before[n]) for n, p in student.named_parameters()]
    assert sum(moved) > len(moved) / 2
