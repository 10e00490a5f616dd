"""Flow matching: every loss against its formula in float64, and sampling by its Euler scheduler."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from ebu_optim import DiagonalFisher
from ebu_optim import diffusion as D
from ebu_optim.diffusion import flow

from .by_hand import gen

SHAPE = (2, 3, 3)
T = torch.tensor([3.0, 250.0, 601.5, 1000.0])


def schedule(scheme: str | None = None, **more) -> FlowMatchEulerDiscreteScheduler:
    found = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **more})
    if scheme:
        found.register_to_config(weighting_scheme=scheme)
    return found


class Affine(nn.Module):
    """A velocity that depends on x_t, t and the class, in closed form."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        self.of_class = nn.Parameter(torch.randn(classes, generator=gen(seed)))
        self.calls: list = []

    def forward(self, x_t, t, class_labels):
        self.calls.append((x_t, t, class_labels))
        return said(self, x_t, t, class_labels)


def said(model, x_t, t, labels):
    a = model.of_class.to(x_t.dtype)[labels].view(-1, 1, 1, 1)
    return a * x_t + (t.to(x_t.dtype) / 1000).view(-1, 1, 1, 1) - a**2


def data():
    x = torch.randn(4, *SHAPE, generator=gen(1))
    return x, torch.tensor([0, 1, 2, 3]), torch.randn(x.shape, generator=gen(2))


def z_and_v(x, e, t):
    """In float64, image by image."""
    sigma = [float(s) / 1000 for s in t]
    x, e = x.double(), e.double()
    z = torch.stack([(1 - s) * a + s * b for s, a, b in zip(sigma, x, e)])
    return z, e - x


def squared(found, target, reduction, weight=None):
    each = [(a - b).square() for a, b in zip(found, target)]
    each = [c.sum() if reduction == "sum" else c.mean() for c in each]
    weight = [1.0] * len(each) if weight is None else weight
    return sum(w * c for w, c in zip(weight, each)) / len(each)


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=1e-6)


WEIGHT = {
    None: lambda s: 1.0,
    "logit_normal": lambda s: 1.0,
    "mode": lambda s: 1.0,
    "sigma_sqrt": lambda s: s**-2,
    "cosmap": lambda s: 2 / math.pi / (1 - 2 * s + 2 * s * s),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("scheme", WEIGHT)
def test_denoising(reduction, scheme):
    (x, y, e), model = data(), Affine()
    ours = D.denoising_loss(
        model, x, y, schedule(scheme), reduction=reduction, timesteps=T, noise=e
    )
    z, v = z_and_v(x, e, T)
    theirs = squared(
        said(model, z, T, y), v, reduction, [WEIGHT[scheme](float(t) / 1000) for t in T]
    )
    close(ours, theirs)
    ((x_t, t, labels),) = model.calls
    close(x_t, z)
    assert torch.equal(t, T)
    assert torch.equal(labels, y)
    for a, b in zip(*(torch.autograd.grad(loss, model.of_class) for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_relabelling_and_distillation_compare_on_z():
    (x, y, _), model, teacher = data(), Affine(), Affine(7)
    for ours, other, source in (
        (
            D.relabel_loss(model, x, y, y + 1, schedule(), timesteps=T, generator=gen(3)),
            y + 1,
            model,
        ),
        (
            D.relabel_loss(
                model, x, y, y + 1, schedule(), teacher=teacher, timesteps=T, generator=gen(3)
            ),
            y + 1,
            teacher,
        ),
        (
            D.distillation_loss(
                model, teacher, x, y, schedule(), reduction="mean", timesteps=T, generator=gen(3)
            ),
            y,
            teacher,
        ),
    ):
        z, _ = z_and_v(x, torch.randn(x.shape, generator=gen(3)), T)
        target = said(source, z, T, other).detach()
        close(ours, squared(said(model, z, T, y), target, "mean"))


def test_crossed_distillation_draws_the_condition():
    (x, y, _), model, teacher = data(), Affine(), Affine(7)
    kept = torch.tensor([3, 4])
    ours = D.distillation_loss(
        model, teacher, x, y, schedule("cosmap"), crossed=kept, timesteps=T, generator=gen(3)
    )
    x_t, _, labels = model.calls[0]
    assert set(labels.tolist()) <= {3, 4}
    found, target = (said(m, x_t.double(), T, labels).detach() for m in (model, teacher))
    close(ours, squared(found, target, "sum", [WEIGHT["cosmap"](float(t) / 1000) for t in T]))


@pytest.mark.parametrize("t", [1.0, 300.0, 500.0, 900.0, 1000.0])
def test_the_gaussian_target_is_the_expected_velocity(t):
    """By the linear regression of v on z over many draws: both Gaussian, it is E[v | z]."""
    n, shape = 200_000, (200_000, 1, 1, 1)
    x, e = (torch.randn(shape, generator=gen(s), dtype=torch.float64) for s in (1, 2))
    times = torch.full((n,), t)
    z, v = (1 - t / 1000) * x + t / 1000 * e, e - x
    slope = float((z * v).mean() / z.square().mean())
    ours, target = flow.of_gaussian(schedule(), torch.randn(shape, generator=gen(3)), times)
    assert float(ours.var()) == pytest.approx(float(z.var()), rel=0.02)
    torch.testing.assert_close(target, ours * float(target[0] / ours[0]))
    assert float(target[0] / ours[0]) == pytest.approx(slope, abs=0.02)


def test_the_gaussian_forget_loss():
    model, shape = Affine(), (4, *SHAPE)
    y = torch.tensor([0, 1, 2, 3])
    ours = D.gaussian_forget_loss(
        model, shape, y, schedule(), reduction="mean", timesteps=T, generator=gen(5)
    )
    g, sigma = torch.randn(shape, generator=gen(5)).double(), T.double().view(-1, 1, 1, 1) / 1000
    variance = 1 - 2 * sigma + 2 * sigma**2
    z = g * variance.sqrt()
    close(ours, squared(said(model, z, T, y), z * (2 * sigma - 1) / variance, "mean"))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_guidance_away_is_the_same_for_velocities_as_for_the_noise_behind_them(variant):
    (z, y, _), model, teacher, null = data(), Affine(), Affine(7), torch.full((4,), 4)
    ours = D.esd_loss(model, teacher, z, T, y, null, variant=variant)
    c, empty = (said(teacher, z.double(), T, labels).detach() for labels in (y, null))
    start, eta = (empty, 1) if variant == "paper" else (c, 2)
    v = start - eta * (c - empty)
    close(ours, squared(said(model, z.double(), T, y), v, "mean"))
    # epsilon = z + (1 - sigma) v
    rest = 1 - T.double().view(-1, 1, 1, 1) / 1000
    noise = [z + rest * u for u in (start, c, empty)]
    torch.testing.assert_close(noise[0] - eta * (noise[1] - noise[2]), z + rest * v)


def test_anchors():
    model, teacher = (lambda x, t, encoder_hidden_states, k=k: k * x for k in (2.0, 5.0))
    z = torch.randn(1, *SHAPE, generator=gen(0))
    ours = D.anchor_loss(model, teacher, z, T[:1], torch.zeros(3, 4, 5), reduction="sum")
    close(ours, 9 * z.double().square().sum())


# -- which sigmas -------------------------------------------------------------------------------


def test_timesteps_are_those_of_a_fresh_scheduler_by_diffusers_density():
    from diffusers.training_utils import compute_density_for_timestep_sampling as density

    for scheme in ("logit_normal", "mode", "none"):
        s = schedule(scheme)
        s.set_timesteps(5)  # what sampling leaves there is not what is trained at
        fresh = schedule().timesteps
        u = density(scheme, 1000, 0.0, 1.0, 1.29, generator=gen(0))
        expected = fresh[(u * 1000).long()]
        assert torch.equal(flow.drawn(s, (1000,), gen(0), "cpu"), expected)
    assert torch.equal(flow.drawn(schedule(), (1000,), gen(0), "cpu"), expected)
    # the shift is the scheduler's, and a dynamic one is not applied in training
    for options, middle in (
        ({"shift": 3.0}, 0.75),
        ({"shift": 1.0}, 0.5),
        ({"use_dynamic_shifting": True}, 0.5),
    ):
        drawn = flow.drawn(schedule(**options), (20_000,), gen(0), "cpu")
        assert float(drawn.median()) / 1000 == pytest.approx(middle, abs=0.01)
        assert drawn.dtype == torch.float32
        assert 0 < float(drawn.min()) < float(drawn.max()) <= 1000


def test_losses_draw_them():
    (x, y, _), model = data(), Affine()
    for loss in (
        lambda g: D.denoising_loss(model, x, y, schedule("logit_normal"), generator=g),
        lambda g: D.relabel_loss(model, x, y, y, schedule("logit_normal"), generator=g),
        lambda g: D.distillation_loss(model, model, x, y, schedule("logit_normal"), generator=g),
    ):
        loss(gen(9))
        expected = flow.drawn(schedule("logit_normal"), (4,), gen(9), "cpu")
        assert torch.equal(model.calls[-1][1], expected)


def test_what_is_not_known_is_refused():
    x, y, _ = data()
    for s, why in (
        (schedule(invert_sigmas=True), "invert_sigmas"),
        (schedule("min_snr"), "min_snr"),
    ):
        with pytest.raises(ValueError, match=why):
            D.denoising_loss(Affine(), x, y, s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_z_and_v_are_computed_in_float32_at_least(dtype):
    x, e = (torch.randn(1, *SHAPE, generator=gen(s)).to(dtype) for s in (0, 1))
    t = torch.tensor([2.0])
    z, v = flow.noised(schedule(), x, e, t)
    there = z_and_v(x, e, t)
    assert z.dtype == dtype
    assert v.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(z, there[0].to(dtype))
    torch.testing.assert_close(v.double(), there[1], rtol=1e-6, atol=1e-6)


# -- Fisher -------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(18, 6), nn.Linear(6, 18)

    def forward(self, x_t, t, class_labels):
        h = torch.tanh(self.a(x_t.flatten(1)) + t[:, None] / 1000 + class_labels[:, None])
        return self.b(h).view_as(x_t)


@pytest.mark.parametrize("method", ["loop", "hooks", "vmap"])
def test_fisher_is_the_mean_square_of_each_images_gradient(method):
    (x, y, _), model, s = data(), Net(), schedule("cosmap")
    batches = D.FisherBatches(x, y, s, timesteps=4, cross=False, batch_size=2, seed=3)
    found = DiagonalFisher.estimate(model, D.fisher_loss(s), batches, method=method)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        for i in range(len(batch["x"])):
            t = batch["t"][i]
            assert t.dtype == torch.float32
            z, v = z_and_v(batch["x"][i].expand(4, *SHAPE), batch["noise"][i], t)
            out = model(z.float(), t, batch["labels"][i].expand(4))
            weight = [WEIGHT["cosmap"](float(u) / 1000) for u in t]
            loss = squared(out, v.float(), "sum", weight)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for (n, _), g in zip(model.named_parameters(), grads):
                expected[n] += g.square() / len(x)
    ours = found.for_model(model)
    for n, p in model.named_parameters():
        torch.testing.assert_close(ours[p], expected[n], rtol=1e-4, atol=1e-5)


# -- sampling -----------------------------------------------------------------------------------


class Exact:
    """The velocity of a model whose only image is c: v = (z - c) / sigma."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, z, t, class_labels):
        self.times.append(float(t[0]))
        c = class_labels.view(-1, 1, 1, 1).float()
        return (z - c) / (t / 1000).view(-1, 1, 1, 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_goes_from_noise_to_the_image(guidance):
    y, model = torch.tensor([1, 2]), Exact()
    found = D.sample(
        model,
        schedule(),
        y,
        SHAPE,
        num_inference_steps=7,
        guidance_scale=guidance,
        null_condition=0,
        clip=False,
        generator=gen(0),
    )
    torch.testing.assert_close(found, (guidance * y).view(2, 1, 1, 1).expand(2, *SHAPE).float())
    assert model.times == pytest.approx([float(t) for t in _set(schedule(), 7)])
    assert model.times[0] == 1000


def _set(scheduler, n):
    scheduler.set_timesteps(n)
    return scheduler.timesteps


def test_a_part_of_the_way_is_on_the_line_between_noise_and_image():
    y = torch.tensor([1, 2])
    start = torch.randn(2, *SHAPE, generator=gen(4))
    for k in range(5):
        x_t = D.sample(
            Exact(),
            schedule(),
            y,
            SHAPE,
            num_inference_steps=5,
            clip=False,
            stop_after=k,
            generator=gen(4),
        )
        sigma = float(_set(schedule(), 5)[k]) / 1000
        expected = (1 - sigma) * y.view(2, 1, 1, 1) + sigma * start
        torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("within_bin", [False, True])
def test_partly_denoised(within_bin):
    y, points = torch.tensor([1, 2]), [float(t) for t in _set(schedule(), 6)]
    seen = set()
    for seed in range(60):
        x_t, t = D.partly_denoised(
            Exact(),
            schedule(),
            y,
            0,
            SHAPE,
            num_inference_steps=6,
            guidance_scale=1.0,
            within_bin=within_bin,
            generator=gen(seed),
        )
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        assert x_t.shape == (2, *SHAPE)
        g = gen(seed)
        k = int(torch.randint(6, (), generator=g))
        sigma, start = points[k] / 1000, torch.randn(2, *SHAPE, generator=g)
        expected = (1 - sigma) * y.view(2, 1, 1, 1) + sigma * start
        torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-5)
        low = points[k + 1] if k < 5 else 0.0
        assert low < float(t[0]) <= points[k] if within_bin else float(t[0]) == points[k]
        seen.add(k)
    assert seen == set(range(6))


def test_a_cached_set(tmp_path):
    class Zero(nn.Module):
        config = type("C", (), {})()

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, z, t, class_labels):
            return Exact()(z, t, class_labels) + self.w

    calls = [
        D.sample_set(
            tmp_path / "set.safetensors",
            Zero(),
            schedule(),
            torch.tensor([1, 2, 1]),
            SHAPE,
            num_inference_steps=3,
            clip=False,
            batch_size=2,
        )
        for _ in range(2)
    ]
    assert torch.equal(calls[0][0], calls[1][0])
    torch.testing.assert_close(calls[0][0][1], torch.full(SHAPE, 2.0))
    with pytest.raises(ValueError, match="another scheduler"):
        D.sample_set(
            tmp_path / "set.safetensors",
            Zero(),
            schedule(shift=1.0),
            torch.tensor([1, 2, 1]),
            SHAPE,
            num_inference_steps=3,
            clip=False,
            batch_size=2,
        )


def test_steps_that_depend_on_the_pictures_size_are_asked_for():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"use_dynamic_shifting, so its .* give one for this size"):
        D.sample(lambda x, t, class_labels: x, scheduler, torch.tensor([0]), (1, 2, 2))
    static = FlowMatchEulerDiscreteScheduler.from_config(
        scheduler.config, use_dynamic_shifting=False, shift=math.exp(0.7)
    )
    sigmas = [1.0, 0.5, 0.25]
    scheduler.set_timesteps(3, sigmas=sigmas, mu=0.7)
    static.set_timesteps(3, sigmas=sigmas)
    torch.testing.assert_close(static.sigmas, scheduler.sigmas)
