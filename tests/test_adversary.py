"""Adversarial embeddings: against a loop by hand, and what they do to a model that forgets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ebu_optim.baselines import Joint
from ebu_optim.checkpoint import load_checkpoint, save_checkpoint
from ebu_optim.diffusion import (
    Adversary,
    denoising_loss,
    distillation_loss,
    next_class,
    relabel_loss,
)
from ebu_optim.metrics.depth import condition_replaced, learn_embedding
from ebu_optim.modules import copied, stream

from .by_hand import gen
from .models import schedule, tiny_unet

SCHEDULE = schedule()
IMAGES = torch.randn(6, 1, 8, 8, generator=gen(5))


def attack_on(model):
    def attack(label: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(IMAGES), (4,), generator=generator)
        labels = torch.full((4,), label)
        return denoising_loss(model, IMAGES[rows], labels, SCHEDULE, generator=generator)

    return attack


def with_row(model, row: int, vector: Tensor):
    """The model as a function, a row of its table in another's place."""
    table = model.class_embedding.weight.detach()
    put = torch.where(torch.arange(len(table))[:, None] == row, vector, table)

    def call(x, t, class_labels=None):
        return functional_call(model, {"class_embedding.weight": put}, (x, t, class_labels))

    return call


def test_it_is_the_loop_by_hand():
    model, other = tiny_unet(), tiny_unet()
    adversary = Adversary(model.class_embedding, [2], steps=3, restart=2, lr=0.5, seed=7)
    table = other.class_embedding.weight.detach()
    for call in range(3):
        adversary.step(attack_on(model))
        if call % 2 == 0:  # it begins anew at every second call
            draw = torch.randn(table.shape[1], generator=stream(14, call // 2))
            vector = (table.mean(0) + table.std(0) * draw).requires_grad_()
            adam = torch.optim.Adam([vector], lr=0.5 * float(table.std()))
        for i in range(3):
            adam.zero_grad()
            loss = attack_on(with_row(other, 2, vector))(2, stream(15, call * 3 + i))
            loss.backward()
            adam.step()
        torch.testing.assert_close(adversary.vectors[0], vector, rtol=1e-4, atol=1e-5)

    # and what the model learns there: the same loss on a table with the vector as a row
    labels, x = torch.tensor([2, 0, 2]), IMAGES[:3]
    other.zero_grad()
    with adversary.at():
        relabel_loss(
            model, x, labels, next_class(labels, 4, forgotten=[2]), SCHEDULE, generator=gen(3)
        ).backward()
    relabel_loss(
        with_row(other, 2, vector.detach()),
        x,
        labels,
        next_class(labels, 4, forgotten=[2]),
        SCHEDULE,
        teacher=tiny_unet(),
        generator=gen(3),
    ).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.grad is not None and not name.startswith("class_embedding"):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    assert adversary.vectors[0].grad is None


def test_only_the_forgotten_conditions_of_what_is_learned_are_replaced():
    table = nn.Embedding(4, 3)
    adversary = Adversary(table, [1, 3])
    adversary.step(lambda label, g: table(torch.tensor([label])).square().sum())
    labels = torch.tensor([0, 1, 2, 3])
    with adversary.at():
        found = table(labels)
        with torch.no_grad():  # a target is of the label itself
            assert torch.equal(table(labels), table.weight)
    for i in (0, 2):
        assert torch.equal(found[i], table.weight[i])
    for i in (1, 3):
        assert torch.equal(found[i], adversary.vectors[0])
    assert torch.equal(table(labels), table.weight)


def test_nothing_else_is_touched():
    model = tiny_unet()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    Adversary(model.class_embedding, [2], count=2).step(attack_on(model))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_several_begin_anew_in_turn_at_given_starts_first_and_aim_at_each_label():
    table, begun = nn.Embedding(9, 3), []
    start = torch.arange(6.0).view(2, 3)
    adversary = Adversary(table, [4, 5, 6], steps=1, restart=4, count=2, start=start, lr=1e-3)
    for call in range(9):
        seen = {}

        def attack(label, g, call=call, seen=seen):
            seen[len(seen)] = label
            return table(torch.tensor([label])).sum()

        before = [v.detach().clone() for v in adversary.vectors]
        adversary.step(attack)
        moved = [(a - b).abs().max() > 0.01 for a, b in zip(before, adversary.vectors)]
        begun += [(call, k, seen[k]) for k in range(2) if call == 0 or moved[k]]
        if call == 0:
            torch.testing.assert_close(torch.stack(adversary.vectors), start, atol=0.01, rtol=0)
    assert begun == [(0, 0, 4), (0, 1, 5), (2, 1, 4), (4, 0, 6), (6, 1, 6), (8, 0, 5)]


def test_a_resumed_adversary_is_the_unbroken_one(tmp_path):
    def new():
        model = tiny_unet()
        return model, Adversary(model.class_embedding, [2], steps=2, restart=3, count=2, seed=1)

    model, whole = new()
    for call in range(5):
        if call == 2:
            save_checkpoint(tmp_path, 2, {"adversary": whole})
        whole.step(attack_on(model))
    model, again = new()
    load_checkpoint(tmp_path, {"adversary": again})
    for _ in range(3):
        again.step(attack_on(model))
    assert all(torch.equal(a, b) for a, b in zip(whole.vectors, again.vectors, strict=True))
    _, other = model, Adversary(model.class_embedding, [2], count=3)
    with pytest.raises(ValueError, match=r"embeddings \(2, 32\), here they are \(3, 32\)"):
        other.load_state_dict(again.state_dict())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"steps": 0}, "steps must be >= 1"),
        ({"restart": 0}, "restart must be"),
        ({"count": 0}, "count must be"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": float("nan")}, "lr must be > 0"),
        ({"start": torch.zeros(1, 4)}, "rows of 3 numbers"),
        ({"aims": []}, "names no label"),
    ],
)
def test_what_cannot_be_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        Adversary(nn.Embedding(4, 3), [1], **given)


def test_an_attack_that_misses_the_embedding_is_refused():
    table = nn.Embedding(4, 3)
    other = torch.ones(1, requires_grad=True)
    for loss in (torch.tensor(1.0), other.sum()):
        with pytest.raises(ValueError, match="does not depend on the adversary's embedding"):
            Adversary(table, [1]).step(lambda label, g, loss=loss: loss)
    with pytest.raises(ValueError, match="must have a weight"):
        Adversary(nn.Identity(), [1])


# -- a world of points: five classes on a circle --------------------------------------------------


class Points(nn.Module):
    """Noise of points (n, 1, 1, 2) by their class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.class_embedding = nn.Embedding(5, 8)
        self.body = nn.Sequential(
            nn.Linear(2 + 8 + 4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        s = t[:, None] / 1000
        time = torch.cat([s, s.square(), (3 * s).cos(), (9 * s).cos()], 1)
        told = torch.cat([x.flatten(1), self.class_embedding(class_labels), time], 1)
        return self.body(told).view_as(x)


def points(labels: Tensor, g: torch.Generator) -> Tensor:
    angle = labels * (2 * torch.pi / 5)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return (centre + 0.05 * torch.randn(len(labels), 2, generator=g)).view(-1, 1, 1, 2)


@pytest.fixture(scope="module")
def base() -> Points:
    model, g = Points(), gen(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(900):
        labels = torch.randint(5, (128,), generator=g)
        optimizer.zero_grad()
        denoising_loss(model, points(labels, g), labels, SCHEDULE, generator=g).backward()
        optimizer.step()
    return model


def drawn(model: nn.Module, label: int) -> float:
    """The share of what the model draws for label 0 that lies at the class `label`."""
    from diffusers import DDIMScheduler

    from ebu_optim.diffusion import sample

    x = sample(
        model,
        DDIMScheduler.from_config(SCHEDULE.config, clip_sample=False),
        torch.zeros(200, dtype=torch.long),
        (1, 1, 2),
        num_inference_steps=20,
        generator=gen(9),
        clip=False,
    )
    at = points(torch.tensor([label]), gen()).flatten()
    return ((x.flatten(1) - at).norm(dim=1) < 0.4).float().mean().item()


def forgetting(base: nn.Module, adversaries: int) -> nn.Module:
    """Class 0 is answered by class 1, the others are held by crossed distillation."""
    model, g = copied(base), gen(2)
    opt = Joint(torch.optim.Adam(model.parameters(), lr=1e-3))
    adversary = Adversary(model.class_embedding, [0], steps=5, count=max(adversaries, 1), seed=3)
    labels, kept = torch.zeros(32, dtype=torch.long), torch.tensor([1, 2, 3, 4])

    def attack(label: int, generator: torch.Generator) -> Tensor:
        x = points(labels, generator)
        return denoising_loss(model, x, labels, SCHEDULE, generator=generator)

    def forget() -> Tensor:
        return relabel_loss(
            model,
            points(labels, g),
            labels,
            next_class(labels, 5, forgotten=[0]),
            SCHEDULE,
            teacher=base,
            reduction="sum",
            generator=g,
        )

    for _ in range(300):
        if adversaries:
            adversary.step(attack)
        with opt.forget():
            loss = forget()
            for k in range(adversaries):
                with adversary.at(k):
                    loss = loss + forget() / adversaries
            loss.backward()
        with opt.remember():
            x = points(kept.repeat(8), g)
            distillation_loss(
                model, base, x, kept.repeat(8), SCHEDULE, crossed=kept, generator=g
            ).backward()
        opt.step()
    return model


def inverted(model: nn.Module) -> float:
    """The share of class 0 in what the model draws with an embedding that was learned on it."""
    real = points(torch.zeros(100, dtype=torch.long), gen(4))
    vector = learn_embedding(model, model.class_embedding, real, SCHEDULE, steps=200)
    with condition_replaced(model.class_embedding, vector):
        return drawn(model, 0)


def test_inversion_finds_what_was_forgotten_without_an_adversary_and_not_with_one(base):
    assert drawn(base, 0) > 0.9
    plain, deep = forgetting(base, 0), forgetting(base, 1)
    for model in (plain, deep):
        assert drawn(model, 0) < 0.05
        assert drawn(model, 1) > 0.5
    found = inverted(plain), inverted(deep)
    assert found[0] > 0.5, found
    assert found[1] < 0.2, found
