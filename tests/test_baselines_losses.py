"""The losses, data and weights that baselines bring along, and what compat="paper" brings back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ebu_optim.baselines import (
    fisher_images,
    next_class,
    relabel_loss,
    replayed_images,
    reset_weights,
)

from .models import schedule, tiny_unet
from .steps import net


def test_next_class_skips_what_is_forgotten():
    labels = torch.tensor([0, 1, 4])
    assert next_class(labels, 5, forgotten=(0, 1, 4)).tolist() == [2, 2, 2]
    assert next_class(labels, 5, forgotten=(1, 4)).tolist() == [2, 2, 0]
    assert next_class(labels, 5, forgotten=(0, 1, 4), compat="paper").tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="leave at least one class"):
        next_class(labels, 2, forgotten=(0, 1))


@pytest.mark.parametrize("compat", [None, "paper"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_next_class_of_labels_of_any_whole_dtype(dtype, compat):
    # as many labels as classes: of uint8 torch would take them for a mask over the classes
    found = next_class(torch.tensor([0, 1, 2], dtype=dtype), 3, forgotten=(1,), compat=compat)
    assert found.dtype == torch.int64
    assert found.tolist() == ([1, 2, 0] if compat else [2, 2, 0])
    with pytest.raises(TypeError, match=r"labels must be whole numbers; got torch\.float32"):
        next_class(torch.tensor([0.0]), 3, forgotten=(1,))


class Linear(nn.Module):
    """eps = slope[class] * x_t + dropout: a model whose predictions are known."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([2.0, -1.0, 0.5, 7.0]))  # 3 is the null class
        self.drop = nn.Dropout(drop)

    def forward(self, x_t, t, class_labels):
        return self.slope[class_labels].view(-1, 1, 1, 1) * self.drop(x_t)


def x_t_by_hand(x, noise, t):
    bar = schedule().alphas_cumprod.numpy()[t.numpy()].reshape(-1, 1, 1, 1)
    return np.sqrt(bar) * x.numpy() + np.sqrt(1 - bar) * noise.numpy()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_relabel_loss_is_its_formula_and_the_target_is_constant(reduction):
    torch.manual_seed(0)
    x, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    t = torch.tensor([3, 500, 900])
    labels, other = torch.tensor([0, 0, 0]), torch.tensor([1, 2, 1])
    model = Linear()
    loss = relabel_loss(
        model, x, labels, other, schedule(), reduction=reduction, timesteps=t, noise=noise
    )
    loss.backward()
    x_t = x_t_by_hand(x, noise, t)
    a, b = (model.slope.detach().numpy()[c].reshape(-1, 1, 1, 1) for c in (labels, other))
    per = 1 / 3 if reduction == "sum" else 1 / 48
    assert loss.item() == pytest.approx(per * (((a - b) * x_t) ** 2).sum(), rel=1e-5)
    gradient = 2 * per * ((a - b) * x_t**2).sum()
    expected = torch.tensor([gradient, 0, 0, 0], dtype=torch.float32)  # none through the target
    torch.testing.assert_close(model.slope.grad, expected)


def test_relabel_loss_takes_a_frozen_teacher():
    x, noise, t = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), torch.tensor([0, 0])
    model, teacher = Linear(), Linear()
    with torch.no_grad():
        teacher.slope[1] = 2.0  # predicts for 1 what the model predicts for 0
    labels, other = torch.tensor([0, 0]), torch.tensor([1, 1])
    same = relabel_loss(
        model, x, labels, other, schedule(), teacher=teacher, timesteps=t, noise=noise
    )
    assert same.item() == 0
    assert relabel_loss(model, x, labels, other, schedule(), timesteps=t, noise=noise) > 1


def test_the_target_has_no_dropout_but_the_papers_has():
    x, noise, t = torch.ones(64, 1, 4, 4), torch.zeros(64, 1, 4, 4), torch.zeros(64).long()
    labels = torch.zeros(64).long()
    model = Linear(drop=0.5).train()
    x_t = x_t_by_hand(x[:1], noise[:1], t[:1]).mean()
    seen = []
    hook = model.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    relabel_loss(model, x, labels, labels + 1, schedule(), timesteps=t, noise=noise)
    assert model.training
    assert model.drop.training
    torch.testing.assert_close(seen[0], torch.full_like(x, -x_t))
    assert (seen[1] == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    seen.clear()
    g = torch.Generator().manual_seed(0)
    relabel_loss(
        model,
        x,
        labels,
        labels + 1,
        schedule(),
        timesteps=t,
        noise=noise,
        compat="paper",
        null_class=3,
        generator=g,
    )
    hook.remove()
    assert (seen[0] == 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_paper_drops_the_condition_of_both_passes_independently():
    n = 4000
    x, noise, t = torch.ones(n, 1, 1, 1), torch.zeros(n, 1, 1, 1), torch.zeros(n).long()
    labels, seen = torch.zeros(n).long(), []
    model = Linear()
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    for compat in (None, "paper"):
        relabel_loss(
            model,
            x,
            labels,
            labels + 1,
            schedule(),
            timesteps=t,
            noise=noise,
            compat=compat,
            null_class=3,
            generator=torch.Generator().manual_seed(0),
        )
    assert (seen[0] == 1).all()
    assert (seen[1] == 0).all()
    target, prediction = (c == 3 for c in seen[2:])
    assert (seen[2][~target] == 1).all()
    assert (seen[3][~prediction] == 0).all()
    for dropped in (target, prediction):
        assert dropped.float().mean() == pytest.approx(0.1, abs=0.025)
    assert (target & prediction).float().mean() == pytest.approx(0.01, abs=0.008)
    for options in ({}, {"null_class": 3, "teacher": model}):
        with pytest.raises(ValueError, match="null_class"):
            relabel_loss(model, x, labels, labels, schedule(), compat="paper", **options)


def test_relabel_loss_of_a_unet_is_repeatable():
    model, x = tiny_unet(), torch.randn(4, 1, 8, 8)
    labels = torch.zeros(4).long()
    losses = [
        relabel_loss(
            model, x, labels, labels + 1, schedule(), generator=torch.Generator().manual_seed(1)
        ).item()
        for _ in range(2)
    ]
    assert losses[0] == losses[1] > 0


def test_replayed_images_as_they_are_or_as_the_paper_reads_them_back():
    x = torch.tensor([[[[-0.5, 0.0], [0.25, 0.5]]], [[[-3.0, 3.0], [0.0, 1.0]]]])
    assert replayed_images(x) is x
    assert fisher_images(x) is x
    # each image by itself from its least to its largest value, in steps of 1/255
    unit = torch.tensor([[[[0, 128], [191, 255]]], [[[0, 255], [128, 170]]]]) / 255
    torch.testing.assert_close(fisher_images(x, compat="paper"), unit)
    torch.testing.assert_close(replayed_images(x, compat="paper"), 2 * unit - 1)
    flat = torch.full((1, 1, 2, 2), 0.3)
    assert fisher_images(flat, compat="paper").eq(0).all()  # no division by zero


@pytest.mark.parametrize("make", [tiny_unet, net])
def test_reset_weights_draws_anew_in_place_by_its_seed(make):
    model, before = make(), make().state_dict()
    held = list(model.parameters())
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    reset_weights(model, 1)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    first = {k: v.clone() for k, v in model.state_dict().items()}
    changed = [k for k, v in first.items() if not torch.equal(v, before[k])]
    assert all(k in changed for k in first if k.endswith("weight") and "norm" not in k)
    reset_weights(model, 2)
    assert any(not torch.equal(v, first[k]) for k, v in model.state_dict().items())
    reset_weights(model, 1)
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    reset_weights(model, 1)  # nothing of the old weights is left
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


def test_the_papers_retraining_starts_from_the_pretrained_weights():
    model = net()
    reset_weights(model, 1, compat="paper")
    assert all(map(torch.equal, model.parameters(), net().parameters()))


def test_reset_weights_names_what_cannot_be_drawn():
    class Null(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.null = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

    model = Null()
    before = model.body.weight.clone()
    with pytest.raises(TypeError, match="null belong"):
        reset_weights(model, 0)
    assert torch.equal(model.body.weight, before)
