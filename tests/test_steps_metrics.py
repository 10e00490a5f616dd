"""unlearn_steps, UT, relearn_steps and inversion by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ebu_optim.diffusion import denoising_loss
from ebu_optim.metrics import inversion, relearn_steps, unlearn_steps
from ebu_optim.metrics.depth import learn_embedding, learn_embeddings, relearn

from .models import schedule, tiny_unet


def curve(*points):
    return [dict(zip(("step", "seconds", "p_f"), p, strict=True)) for p in points]


def test_interpolated_by_hand():
    # threshold 0.9 - 0.95 * 0.8 = 0.14; between 0.34 and 0.04 that is two thirds of the way
    found = unlearn_steps(curve((0, 0, 0.9), (10, 2.0, 0.34), (40, 5.0, 0.04)), base=0.9, level=0.1)
    assert found["steps"] == pytest.approx(30)
    assert found["seconds"] == pytest.approx(4)
    assert found["threshold"] == pytest.approx(0.14)
    assert (found["reached"], found["stays"], found["within"]) == (True, True, 40)


def test_the_first_crossing_counts_and_a_later_rise_is_told():
    points = curve((0, 0, 1.0), (10, 1, 0.0), (20, 2, 0.5), (30, 3, 0.0))
    found = unlearn_steps(points, base=1.0, level=0.0)
    assert found["steps"] == pytest.approx(9.5)
    assert found["stays"] is False


def test_not_reached_exactly_reached_and_no_point_at_step_0():
    found = unlearn_steps(curve((0, 0, 1.0), (50, 9, 0.06)), base=1.0, level=0.0)
    assert (found["steps"], found["seconds"], found["reached"]) == (None, None, False)
    assert (found["within"], found["within_seconds"], found["stays"]) == (50, 9, None)
    found = unlearn_steps(curve((0, 0, 1.0), (8, 4, 0.25)), base=1.0, level=0.0, share=0.75)
    assert (found["steps"], found["seconds"], found["stays"]) == (8, 4, True)
    found = unlearn_steps(curve((10, 5, 0.0)), base=1.0, level=0.0)
    assert (found["steps"], found["seconds"]) == pytest.approx((9.5, 4.75))
    assert unlearn_steps(curve((0, 0, 0.01)), base=1.0, level=0.0)["steps"] == 0


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([], {}, "curve holds no point"),
        ([{"step": 0, "p_f": 1}], {}, "point 0 of curve lacks seconds"),
        (curve((0, 0, 1), (5, 1, math.nan)), {}, "point 1 of curve holds NaN"),
        (curve((5, 0, 1), (5, 1, 0)), {}, "must go forward"),
        (curve((0, 2, 1), (5, 1, 0)), {}, "must go forward"),
        (curve((0, 0, 1)), {"level": 1.0}, "level must be below base.*reject class"),
        (curve((0, 0, 1)), {"share": 1.5}, r"share must be in \(0, 1\]"),
    ],
)
def test_bad_curves_are_named(points, options, message):
    with pytest.raises(ValueError, match=message):
        unlearn_steps(points, **{"base": 1.0, "level": 0.0, **options})


REAL = torch.full((8, 1, 8, 8), 0.5)
OPTIONS = {"batch_size": 4, "seed": 3}


def moved(model, start):
    """Something of the weights that grows with the steps of Adam: 1e-4 a step and weight."""
    weight = model.conv_in.weight.detach()
    return float((weight - start).abs().mean()) / 1e-4


def test_relearn_steps_counts_interpolates_and_gives_up():
    model = tiny_unet().train()
    start = model.conv_in.weight.detach().clone()
    run = (model, REAL, 2, schedule())
    values = [moved(relearn(*run, steps=n, **OPTIONS), start) for n in (0, 2, 4)]
    assert values[0] == 0 < values[1] < values[2]
    level = (values[1] + 3 * values[2]) / 4 / 10  # three quarters of the way from step 2 to 4
    modes = []

    def p_f(student):
        modes.append(student.training)
        return moved(student, start) / 10

    found = relearn_steps(*run, p_f, level=level, every=2, max_steps=9, **OPTIONS)
    assert found["steps"] == pytest.approx(3.5)
    assert found["reached"]
    assert [r["step"] for r in found["curve"]] == [0, 2, 4]
    assert [r["p_f"] for r in found["curve"]] == pytest.approx([v / 10 for v in values])
    assert modes == [False] * 3
    assert torch.equal(model.conv_in.weight, start)
    assert model.training

    found = relearn_steps(*run, lambda _: 0.1, every=2, max_steps=5, **OPTIONS)
    assert (found["steps"], found["reached"], found["within"]) == (None, False, 5)
    assert [r["step"] for r in found["curve"]] == [0, 2, 4, 5]
    found = relearn_steps(*run, lambda _: 0.5, **OPTIONS)
    assert (found["steps"], found["within"]) == (0, 0)  # never forgotten


def test_inversion_at_several_steps_is_one_run_and_the_same_as_several():
    model = tiny_unet()
    row = model.class_embedding
    run = (model, row, REAL, schedule())
    found = learn_embeddings(*run, at=(4, 0, 2), **OPTIONS)
    assert list(found) == [0, 2, 4]
    for n in (2, 4):
        assert torch.equal(found[n], learn_embedding(*run, steps=n, **OPTIONS))
    torch.testing.assert_close(found[0], row.weight.detach().mean(0))

    def p_f(m):
        return float(m.class_embedding(torch.tensor([1, 2])).detach().sum())

    measured = inversion(*run, p_f, at=(2, 4), **OPTIONS)
    assert measured == {f"inversion_{n}": pytest.approx(2 * float(found[n].sum())) for n in (2, 4)}
    assert torch.equal(row(torch.tensor([1])), row.weight[1:2])


def test_a_given_loss_takes_the_place_of_the_denoising_loss_bit_for_bit():
    def loss(model, x, labels, generator):
        return denoising_loss(model, x, labels, schedule(), reduction="mean", generator=generator)

    model = tiny_unet()
    ours, theirs = (
        (
            learn_embedding(model, model.class_embedding, REAL, s, steps=3, loss=given, **OPTIONS),
            *relearn(model, REAL, 2, s, steps=3, loss=given, **OPTIONS).state_dict().values(),
        )
        for s, given in ((schedule(), None), (None, loss))
    )
    assert len(ours) > 10
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Drawn(nn.Module):
    """No diffusion model: it draws the same image for every label of a class, its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)

    def forward(self, labels):
        return self.embedding(labels).view(-1, 1, 2, 2)


def squared_error(model, x, labels, generator):
    return (model(labels) - x).square().mean()


def test_a_model_of_another_kind_by_its_own_loss():
    torch.manual_seed(0)
    model, real = Drawn(), torch.full((5, 1, 2, 2), 0.5)
    before = model.embedding.weight.detach().clone()

    def p_f(m):
        return 1 - float((m(torch.tensor([1])) - real[:1]).abs().mean().detach())

    assert p_f(model) < 0.5
    attack = {"loss": squared_error, **OPTIONS}
    found = inversion(model, model.embedding, real, None, p_f, at=(1, 200), **attack)
    assert found["inversion_1"] < 0.9 < 0.99 < found["inversion_200"]
    again = relearn_steps(model, real, 1, None, p_f, lr=0.1, every=1, level=0.9, **attack)
    assert again["reached"]
    assert torch.equal(model.embedding.weight, before)
    student = relearn(model, real, 1, None, steps=2, **attack)
    changed = (student.embedding.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False]  # by the label that was given


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "scheduler is None; .* loss="),
        (lambda m, x, y, g: (m(y) - x).square(), "loss must return a 0-d tensor"),
        (lambda m, x, y, g: squared_error(m, x, y, g).item(), "loss must return a 0-d tensor"),
        (
            lambda m, x, y, g: (m.embedding.weight[y] - x.flatten(1)).square().mean(),
            "with a gradient; .* let the model call its `embedding`",
        ),
    ],
)
def test_a_loss_that_attacks_nothing_is_refused(loss, message):
    model = Drawn()
    before = model.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        learn_embedding(model, model.embedding, torch.zeros(2, 1, 2, 2), None, steps=2, loss=loss)
    assert torch.equal(model.embedding.weight, before)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: relearn(m, REAL, 5, schedule(), steps=1), r"label must be in 0\.\.4.*got 5"),
        (lambda m: relearn(m, REAL[:0], 0, schedule(), steps=1), "images must have shape"),
        (lambda m: relearn(m, REAL, 0, schedule(), steps=1, batch_size=0), "batch_size must be"),
        (lambda m: relearn_steps(m, REAL, 0, schedule(), lambda _: 0, every=0), "every must be"),
        (lambda m: relearn_steps(m, REAL, 0, schedule(), lambda _: 0, level=50), "level must be"),
        (
            lambda m: learn_embeddings(m, m.class_embedding, REAL, schedule(), at=()),
            "at must hold numbers of steps",
        ),
        (
            lambda m: learn_embedding(m, m.class_embedding, REAL[0], schedule(), steps=1),
            r"images must have shape.*got \(1, 8, 8\)",
        ),
    ],
)
def test_bad_attacks_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_unet())


# -- models that compute a weight from others -------------------------------------------------

COMPUTED = {
    "weight_norm": lambda m: nn.utils.weight_norm(m[1]),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m[1]),
    "pruned": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
    "parametrized": lambda m: nn.utils.parametrizations.spectral_norm(m[1]),
    "cached": lambda m: m.register_forward_hook(
        lambda m, _, out: setattr(m, "seen", {"out": [out]})
    ),
}


def computing(how: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
        COMPUTED[how](m)
    return m


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_relearning_copies_a_model_after_a_backward_pass(how):
    images = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))

    def loss(model, x, labels, generator):
        return nn.functional.cross_entropy(model(x), labels)

    found = []
    for used in (True, False):
        m = computing(how)
        with torch.set_grad_enabled(used):
            out = m(images).sum()
        if used:
            out.backward()
        before = {n: t.clone() for n, t in m.state_dict().items()}
        options = {"loss": loss, "batch_size": 4}
        student = relearn(m, images, 1, None, steps=3, lr=0.1, **options)
        found.append([*student.state_dict().values(), student(images)])
        assert all(torch.equal(t, before[n]) for n, t in m.state_dict().items())
        assert not torch.equal(student(images), m(images))
        p_f = relearn_steps(m, images, 1, None, lambda s: 1.0, max_steps=1, **options)
        assert p_f["steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
