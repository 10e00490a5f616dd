"""What ESD and SPM learn from, against their formulas in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from ebu_optim.baselines import (
    anchor_loss,
    esd_loss,
    esd_target,
    partly_denoised,
    random_anchors,
    transport,
)

from .models import schedule

CONDITION, NULL = torch.tensor([0, 1]), torch.tensor([3, 3])


class Linear(nn.Module):
    """eps = slope[class] * x_t."""

    def __init__(self, slopes=(2.0, -1.0, 0.5, 7.0)):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slopes))

    def forward(self, x_t, t, class_labels):
        return self.slope[class_labels].view(-1, 1, 1, 1) * x_t


def by_hand(x, theta, theta0, trained, start, eta):
    target = [s - eta * (theta0[c] - theta0[3]) for s, c in zip(start, (0, 1))]
    error = [(theta[c] - g) * a for c, g, a in zip(trained, target, x.numpy())]
    return np.mean([np.mean(e**2) for e in error])


def test_esd_loss_is_its_formula_in_both_variants():
    torch.manual_seed(0)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([5, 5])
    model, teacher = Linear((1.0, 3.0, -2.0, 4.0)), Linear()
    theta, theta0 = model.slope.detach().numpy(), teacher.slope.detach().numpy()
    null, own = theta0[[3, 3]], theta0[[0, 1]]
    other = torch.tensor([2, 0])
    for options, trained, start, eta in (
        ({}, (0, 1), null, 1.0),
        ({"eta": 3.0}, (0, 1), null, 3.0),
        ({"variant": "released"}, (0, 1), own, 2.0),
        ({"variant": "released", "eta": 1.0, "erase_from": other}, (2, 0), theta0[[2, 0]], 1.0),
    ):
        loss = esd_loss(model, teacher, x, t, CONDITION, NULL, **options)
        expected = by_hand(x, theta, theta0, trained, start, eta)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)
    loss.backward()
    assert teacher.slope.grad is None
    summed = esd_loss(model, teacher, x, t, CONDITION, NULL, reduction="sum")
    mean = esd_loss(model, teacher, x, t, CONDITION, NULL)
    np.testing.assert_allclose(summed.item(), 16 * mean.item(), rtol=1e-6)


def test_the_released_target_with_eta_2_is_the_papers_with_1():
    c, null = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    released = esd_target(c, null, eta=2.0, eps_from=c)
    torch.testing.assert_close(released, esd_target(c, null, eta=1.0))
    torch.testing.assert_close(released, 2 * null - c)


def test_the_target_is_the_same_in_epsilon_and_in_v():
    """v = (eps - spread x_t) / signal for a fixed x_t."""
    x_t, c, null = torch.randn(3, 1, 8, dtype=torch.float64)
    signal, spread = 0.6, 0.8

    def v(eps):
        return (eps - spread * x_t) / signal

    for eta, start in ((1.0, None), (2.0, c)):
        target = esd_target(c, null, eta=eta, eps_from=start)
        in_v = esd_target(v(c), v(null), eta=eta, eps_from=None if start is None else v(start))
        torch.testing.assert_close(in_v, v(target))


def test_esd_loss_refuses_what_no_variant_has():
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="variant must be"):
        esd_loss(Linear(), Linear(), x, t, CONDITION, NULL, variant="new")
    with pytest.raises(ValueError, match="which starts from null"):
        esd_loss(Linear(), Linear(), x, t, CONDITION, NULL, erase_from=NULL)


def test_partly_denoised_stops_after_k_steps():
    """Against DDIM by hand, for every k that is drawn."""
    scheduler = DDIMScheduler.from_config(schedule().config, clip_sample=False)
    model, bar = Linear((0.1, 0.2, 0.3, 0.05)), scheduler.alphas_cumprod.double().numpy()
    slopes = model.slope.detach().double().numpy()
    eps = 0.05 + 3 * (slopes[[0, 1]] - 0.05)
    seen = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x_t, t = partly_denoised(
            model,
            scheduler,
            CONDITION,
            3,
            (1, 2, 2),
            num_inference_steps=5,
            earliest=1,
            generator=g,
        )
        k = scheduler.timesteps.tolist().index(int(t[0]))
        g = torch.Generator().manual_seed(seed)
        torch.randint(1, 5, (), generator=g)
        x = torch.randn((2, 1, 2, 2), generator=g).double().numpy()
        for i in range(k):
            a = bar[scheduler.timesteps[i]]
            b = bar[scheduler.timesteps[i] - 200] if i < 4 else scheduler.final_alpha_cumprod
            e = eps.reshape(2, 1, 1, 1) * x
            x = np.sqrt(b) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - b) * e
        np.testing.assert_allclose(x_t.numpy(), x, rtol=1e-4)
        seen.add(k)
    assert seen == {1, 2, 3, 4}


def test_a_timestep_within_the_bin():
    scheduler = DDIMScheduler.from_config(schedule().config, clip_sample=False)
    pairs = set()
    for seed in range(60):
        x_t, t = partly_denoised(
            Linear(),
            scheduler,
            CONDITION,
            3,
            (1, 2, 2),
            num_inference_steps=5,
            within_bin=True,
            generator=torch.Generator().manual_seed(seed),
        )
        assert x_t.shape == (2, 1, 2, 2)
        assert t[0] == t[1]
        pairs.add(int(t[0]))
    assert 0 <= min(pairs) < 200
    assert 800 <= max(pairs) < 1000
    assert len({t % 200 for t in pairs}) > 30
    with pytest.raises(ValueError, match="earliest must be in"):
        partly_denoised(
            Linear(), scheduler, CONDITION, 3, (1, 2, 2), num_inference_steps=5, earliest=5
        )


class Dot(nn.Module):
    """eps = mean of the text embedding * weight * x_t."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x_t, t, encoder_hidden_states):
        return self.weight * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1) * x_t


def test_anchor_loss_is_its_formula():
    torch.manual_seed(0)
    x, t, anchors = torch.randn(1, 1, 2, 2), torch.tensor([7]), torch.randn(4, 3, 5)
    loss = anchor_loss(Dot(3.0), Dot(1.0), x, t, anchors)
    means = anchors.numpy().mean((1, 2)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(loss.item(), np.mean((2.0 * means * x.numpy()) ** 2), rtol=1e-5)


def test_random_anchors_keep_the_norm_and_avoid_the_target():
    torch.manual_seed(0)
    target = torch.randn(1, 2)
    anchors = random_anchors(target, 2000, generator=torch.Generator().manual_seed(1))
    ratio = anchors.flatten(1).norm(dim=1) / target.norm()
    assert ratio.min() >= 0.8
    assert ratio.max() <= 1.2
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.01)
    # of uniform directions in the plane, c = cos(u), a share min(1, 1 - c) is accepted: in all
    # 1/2 + 1/2 - 1/pi, and the integral of c over it is -1/pi + 1/pi - 1/4
    cos = torch.cosine_similarity(anchors.flatten(1), target.flatten()[None])
    assert cos.mean().item() == pytest.approx(-0.25 / (1 - 1 / np.pi), abs=0.04)
    again = random_anchors(target, 2000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(anchors, again)


def test_transport_is_the_papers_formula():
    e = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    near, far = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 0.0]])
    found = transport(e, [5, 6, 7], [(near, [9]), (far, [6, 7, 8]), (near, [6]), (far, [1])])
    np.testing.assert_allclose(found, [0.6, 2 / 3, 1.0, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="has no tokens"):
        transport(e, [5], [(near, [])])
