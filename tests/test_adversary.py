"""Adversary: against its formula, and what it must not touch."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ebu_optim.diffusion import Adversary

SCHEDULER = DDPMScheduler(num_train_timesteps=10)


class Shift(nn.Module):
    """Predicts scale * x_t minus the condition, an image of 2x2."""

    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Embedding(3, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, class_labels):
        condition = self.class_embedding(class_labels).view(len(x), 1, 2, 2)
        return SimpleNamespace(sample=self.scale * x - condition)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Shift()


def adversary(model, **options):
    return Adversary(model, model.class_embedding, SCHEDULER, **{"seed": 3, **options})


def test_the_first_step_is_adams_against_the_denoising_loss(model):
    a = adversary(model, count=2)
    before, draws = a.vectors.clone(), torch.Generator()
    draws.set_state(a.state_dict()["draws"])
    x = torch.randn(4, 1, 2, 2)
    loss = a.attack(x)
    # the same draws: antithetic timesteps, then the noise
    t = torch.randint(10, (3,), generator=draws)
    t = torch.cat([t, 9 - t])[:4]
    eps = torch.randn(x.shape, generator=draws)
    alpha_bar = SCHEDULER.alphas_cumprod[t].view(4, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps
    error = x_t - before[torch.tensor([0, 1, 0, 1])].view(4, 1, 2, 2) - eps
    torch.testing.assert_close(loss, error.square().mean())
    gradient = torch.stack([-2 * error[i::2].sum(0).flatten() / error.numel() for i in (0, 1)])
    torch.testing.assert_close(a.vectors, before - 0.1 * gradient / (gradient.abs() + 1e-8))


def test_it_finds_the_condition_that_brings_the_class_back(model):
    # constant images: the best condition is known, E[x_t - eps] over t; Adam 0.1 stays noisy
    a, x = adversary(model, count=2, restart=10_000), torch.ones(64, 1, 2, 2)
    for _ in range(400):
        a.attack(x)
    best = SCHEDULER.alphas_cumprod.sqrt().mean()
    torch.testing.assert_close(a.vectors, best.expand(2, 4), atol=0.2, rtol=0)


def test_nothing_else_is_touched(model):
    model.train()
    model.scale.grad = torch.ones(())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    adversary(model).attack(torch.zeros(4, 1, 2, 2))
    assert model.training
    assert model.scale.grad == 1
    assert model.class_embedding.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])


def test_share_of_the_batch(model):
    a = adversary(model, count=4, share=0.25)
    labels = torch.zeros(4000, dtype=torch.long)
    with a.applied():
        out = model.class_embedding(labels)
    own = (out == model.class_embedding.weight[0]).all(dim=1)
    assert 0.72 < own.float().mean() < 0.78
    drawn = (out[~own][:, None] == a.vectors).all(dim=2)
    assert drawn.any(dim=1).all()
    assert drawn.any(dim=0).all()
    assert torch.equal(model.class_embedding(labels[:1])[0], model.class_embedding.weight[0])


def test_a_swapped_condition_leaves_its_own_row_alone(model):
    with adversary(model, share=1.0).applied():
        model.class_embedding(torch.tensor([1, 1])).sum().backward()
    assert torch.equal(model.class_embedding.weight.grad, torch.zeros(3, 4))


def test_one_begins_anew_in_turn_and_a_loaded_one_goes_on(model):
    x = torch.randn(6, 1, 2, 2)
    a = adversary(model, count=2, restart=3)
    for _ in range(4):
        a.attack(x)
    assert a.state_dict()["age"].flatten().tolist() == [4, 1]
    b = adversary(model, count=2, restart=3, seed=6)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in range(4):
        a.attack(x)
        b.attack(x)
    assert torch.equal(a.vectors, b.vectors)
    assert a.state_dict()["age"].flatten().tolist() == [2, 5]
    with pytest.raises(ValueError, match="same count"):
        adversary(model, count=3).load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count"), ({"restart": 0}, "restart"), ({"share": 0}, "share"),
        ({"share": 1.5}, "share"), ({"lr": 0}, "lr"),
    ],
)  # fmt: skip
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        adversary(model, **options)


def test_bad_input(model):
    with pytest.raises(ValueError, match="weight of shape"):
        Adversary(model, nn.Identity(), SCHEDULER)
    with pytest.raises(ValueError, match="n >= 4"):
        adversary(model).attack(torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\(n, C, H, W\)"):
        adversary(model).attack(torch.zeros(8, 2, 2))
