"""Losses against their formulas, sampling, cached sets."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ebu_optim import EBUOptimizer
from ebu_optim import diffusion as D

from .models import schedule, tiny_unet

SHAPE = (1, 8, 8)


class Recorder:
    """A model that keeps what it was called with and predicts a constant."""

    def __init__(self, value: float = 0.0) -> None:
        self.value, self.calls = value, []

    def __call__(self, x, t, class_labels=None, **kwargs):
        self.calls.append((x, t, class_labels, kwargs))
        return torch.full_like(x, self.value)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 4):
    return torch.rand(n, *SHAPE, generator=gen(1)) * 2 - 1, torch.arange(n) % 5


def test_timesteps_are_antithetic_cut_to_n_and_uniform():
    for n in (1, 2, 5, 8):
        t = D.antithetic_timesteps(n, 1000, generator=gen())
        half = n // 2 + 1
        assert t.shape == (n,)
        assert t.dtype == torch.int64
        assert torch.equal(t[half:], 999 - t[: n - half])
    many = D.antithetic_timesteps(20000, 10, generator=gen())
    counts = torch.bincount(many, minlength=10)
    assert counts.min() > 1800
    assert len(counts) == 10


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_loss_is_its_formula(reduction, kind):
    x, y = data()
    scheduler, model = schedule(kind), Recorder(0.3)
    t, noise = torch.tensor([0, 10, 500, 999]), torch.randn(x.shape, generator=gen(2))
    got = D.denoising_loss(model, x, y, scheduler, reduction=reduction, timesteps=t, noise=noise)
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x + (1 - a).sqrt() * noise
    target = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x
    square = (0.3 - target).square().flatten(1)
    expected = (square.sum(1) if reduction == "sum" else square.mean(1)).mean()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(model.calls[0][0], x_t)
    assert torch.equal(model.calls[0][2], y)


@pytest.mark.parametrize(
    "other", [EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler, PNDMScheduler]
)
def test_losses_do_not_depend_on_the_kind_of_scheduler(other):
    x, y = data()
    same = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    losses = [
        D.denoising_loss(tiny_unet(), x, y, s, generator=gen())
        for s in (schedule(), other(num_train_timesteps=1000, **same))
    ]
    torch.testing.assert_close(*losses)


def test_a_scheduler_without_alphas_is_refused():
    x, y = data()
    bare = type("Flow", (), {"config": schedule().config, "alphas_cumprod": None})()
    t = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="Flow has no alphas_cumprod"):
        D.denoising_loss(Recorder(), x, y, bare, timesteps=t)


def test_bfloat16_models_are_given_their_dtype():
    model, (x, y) = tiny_unet().bfloat16(), data()
    for loss in (
        D.denoising_loss(model, x, y, schedule(), generator=gen()),
        D.gaussian_forget_loss(model, x.shape, y, schedule(), generator=gen()),
        D.distillation_loss(model, model, x, y, schedule(), generator=gen()),
    ):
        assert loss.dtype == torch.float32
    assert D.sample(model, ddim(), y, SHAPE, num_inference_steps=2).dtype == torch.float32


def test_condition_may_be_keyword_arguments_and_output_an_object():
    x, _ = data()
    model = Recorder()
    D.denoising_loss(model, x, {"encoder_hidden_states": x}, schedule(), generator=gen())
    assert model.calls[0][3]["encoder_hidden_states"] is x
    assert D.denoising_loss(tiny_unet(), x, data()[1], schedule(), generator=gen()) > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_analytic_gaussian_loss_has_the_gradient_of_the_sampled_one(kind):
    """Both are quadratic in a model w * x_t; its gradient is known and both must estimate it."""
    w = torch.tensor(0.4, requires_grad=True)

    def model(x, t, class_labels=None):
        return w * x

    scheduler, n = schedule(kind), 100_000
    t = torch.full((n,), 300)
    label = torch.zeros(n, dtype=torch.long)
    shape = (n, 1, 2, 2)
    x = torch.randn(shape, generator=gen(1))
    sampled = D.denoising_loss(model, x, label, scheduler, timesteps=t, generator=gen(2))
    analytic = D.gaussian_forget_loss(model, shape, label, scheduler, timesteps=t, generator=gen(3))
    a, b = (torch.autograd.grad(loss, w)[0] for loss in (sampled, analytic))
    scale = float((1 - scheduler.alphas_cumprod[300]).sqrt())
    expected = 2 * 4 * (0.4 - (scale if kind == "epsilon" else 0.0))
    assert float(b) == pytest.approx(expected, abs=0.05)
    assert float(a) == pytest.approx(expected, abs=0.05)
    assert analytic < sampled  # without the noise of a sampled eps


def test_surrogates():
    u = D.surrogate_noise("uniform", (500, *SHAPE), generator=gen())
    n = D.surrogate_noise("gaussian", (500, *SHAPE), generator=gen())
    assert u.min() >= -1
    assert u.max() <= 1
    assert float(u.var()) == pytest.approx(1 / 3, abs=0.02)
    assert float(n.var()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="surrogate must be"):
        D.surrogate_noise("zeros", (1, *SHAPE))


def test_distillation_matches_the_teacher_on_the_same_noised_image():
    x, y = data()
    model, teacher = Recorder(1.0), Recorder(0.5)
    got = D.distillation_loss(model, teacher, x, y, schedule(), reduction="mean", generator=gen())
    assert float(got) == pytest.approx(0.25)
    for a, b in zip(model.calls[0][:3], teacher.calls[0][:3], strict=True):
        assert torch.equal(a, b)


def test_crossed_distillation_draws_conditions_from_all_kept_classes():
    x, y = data(64)
    model, teacher, kept = Recorder(), Recorder(), torch.tensor([1, 2, 7])
    D.distillation_loss(model, teacher, x, y, schedule(), crossed=kept, generator=gen())
    labels = model.calls[0][2]
    assert set(labels.tolist()) == {1, 2, 7}
    assert torch.equal(labels, teacher.calls[0][2])


def test_teacher_gets_no_gradient():
    x, y = data()
    model, teacher = tiny_unet(), tiny_unet()
    D.distillation_loss(model, teacher, x + 0.1, y, schedule(), generator=gen()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_anchored_is_the_pretrained_model_without_a_copy():
    model, frozen = tiny_unet(), tiny_unet()
    opt = EBUOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = data()
    t = torch.tensor([1, 2, 3, 4])
    for _ in range(2):
        opt.step(
            forget=lambda: D.denoising_loss(model, x, y, schedule(), generator=gen()).backward(),
            remember=lambda: D.denoising_loss(model, -x, y, schedule()).backward(),
        )
    expected = frozen(x, t, class_labels=y).sample
    teacher = D.anchored(model, opt)
    torch.testing.assert_close(teacher(x, t, class_labels=y).sample, expected)
    assert not torch.allclose(model(x, t, class_labels=y).sample, expected)


def test_anchored_is_in_eval_mode_and_leaves_buffers_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.b, self.d = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5)

        def forward(self, x, t, class_labels=None):
            return self.d(self.b(self.c(x)))

    model, x = Net().train(), data()[0]
    opt = EBUOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    teacher = D.anchored(model, opt)
    with pytest.raises(RuntimeError, match=r"no theta0.*anchor="):
        teacher(x, None)
    with_anchor = EBUOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        fisher=None,
        anchor={p: p.detach() for p in model.parameters()},
    )
    other = D.anchored(model, with_anchor)
    with opt.forget():
        model(x, None).sum().backward()
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert torch.equal(teacher(x, None), teacher(x, None))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model.d.training
    assert torch.equal(other(x, None), teacher(x, None))


def test_noisy_condition_is_bounded_by_the_spread_and_leaves_nothing_behind():
    embedding = nn.Embedding(3, 4000)
    label = torch.zeros(200, dtype=torch.long)
    clean = embedding(label)
    spread = float(embedding.weight.detach().std())
    with D.noisy_condition(embedding, 0.5, generator=gen()):
        widths = (embedding(label) - clean).std(1)
    assert widths.max() < 0.5 * spread * 1.1
    assert float(widths.mean().detach()) == pytest.approx(0.25 * spread, rel=0.15)
    assert torch.equal(embedding(label), clean)
    mixed, only = torch.tensor([0, 1, 2, 1]), torch.tensor([1])
    with D.noisy_condition(embedding, 1.0, only=only, generator=gen()):
        moved = (embedding(mixed) != embedding.weight[mixed]).any(1)
    assert moved.tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match="scale must be"), D.noisy_condition(embedding, -1.0):
        pass


def test_draws_come_from_the_given_generator_alone():
    x, y = data()
    state = torch.get_rng_state()
    losses = [
        float(D.denoising_loss(tiny_unet(), x, y, schedule(), generator=gen(5))) for _ in range(2)
    ]
    assert losses[0] == losses[1]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    D.denoising_loss(Recorder(), x, y, schedule(), generator=gen(5))
    assert torch.equal(torch.get_rng_state(), state)


def ddim() -> DDIMScheduler:
    return DDIMScheduler.from_config(schedule().config)


def test_guidance_is_null_plus_w_times_the_difference():
    class Linear:
        def __call__(self, x, t, class_labels=None):
            return x * 0 + class_labels.view(-1, 1, 1, 1) / 10

    y = torch.tensor([1, 2])
    args = {"shape": SHAPE, "num_inference_steps": 3, "clip": False}
    guided = D.sample(
        Linear(), ddim(), y, guidance_scale=3.0, null_condition=4, generator=gen(), **args
    )
    # eps_null + 3 (eps_c - eps_null) with eps = label / 10 is a label of 4 + 3 (c - 4)
    plain = D.sample(Linear(), ddim(), 4 + 3 * (y - 4), generator=gen(), **args)
    torch.testing.assert_close(guided, plain)
    with pytest.raises(ValueError, match="needs null_condition"):
        D.sample(Linear(), ddim(), y, guidance_scale=2.0, **args)


def test_sampling_is_in_range_and_repeats_with_its_seed():
    y = torch.tensor([0, 1, 2])
    a, b = (
        D.sample(tiny_unet(), ddim(), y, SHAPE, num_inference_steps=2, generator=gen(4))
        for _ in range(2)
    )
    assert a.shape == (3, *SHAPE)
    assert torch.equal(a, b)
    assert a.abs().max() <= 1


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_other_samplers(kind):
    times = []

    class Watched(Recorder):
        def __call__(self, x, t, class_labels=None):
            times.append(t)
            return super().__call__(x, t, class_labels)

    scheduler = kind.from_config(schedule().config)
    x = D.sample(Watched(), scheduler, torch.tensor([0, 1]), SHAPE, num_inference_steps=6)
    assert x.isfinite().all()
    assert [float(t[0]) for t in times] == [float(t) for t in scheduler.timesteps]


def make_set(path, model=None, **kwargs):
    labels = torch.tensor([0, 1, 2, 3, 0])
    return D.sample_set(
        path,
        model or tiny_unet(),
        ddim(),
        labels,
        SHAPE,
        **{"num_inference_steps": 2, "batch_size": 2, **kwargs},
    )


def test_set_is_cached_and_an_interrupted_one_goes_on_to_the_same_result(tmp_path):
    whole, labels = make_set(tmp_path / "a.safetensors")
    assert labels.tolist() == [0, 1, 2, 3, 0]

    calls = {"n": 0}
    model = tiny_unet()
    forward = model.forward

    def stopping(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == 4:  # in the second batch
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.forward = stopping
    path = tmp_path / "b.safetensors"
    with pytest.raises(KeyboardInterrupt):
        make_set(path, model)
    assert not path.exists()
    calls["n"] = 10
    resumed, _ = make_set(path, model)
    assert torch.equal(whole, resumed)
    assert calls["n"] == 10 + 4  # two of three batches, two steps each
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    cached, _ = make_set(path, model)
    assert calls["n"] == 14
    assert torch.equal(cached, whole)


def test_two_seeds_are_two_sets(tmp_path):
    sets = [make_set(tmp_path / f"{s}.safetensors", seed=s)[0] for s in (0, 1, 12345, 2**32)]
    assert all(not torch.equal(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :])


def test_what_a_killed_call_left_is_no_hindrance(tmp_path):
    parts = tmp_path / "a.safetensors.parts"
    parts.mkdir()
    (parts / ".00000000.safetensors.123.tmp").write_bytes(b"half")
    for _ in range(2):
        make_set(tmp_path / "a.safetensors")
        assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
        parts.mkdir()  # a kill just before it is removed


def test_a_scheduler_with_other_lists_is_another_scheduler(tmp_path):
    def betas(last):
        return DDIMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, last])

    args = (torch.tensor([0, 1]), SHAPE)
    D.sample_set(tmp_path / "a", tiny_unet(), betas(0.3), *args, num_inference_steps=2)
    with pytest.raises(ValueError, match="another scheduler"):
        D.sample_set(tmp_path / "a", tiny_unet(), betas(0.4), *args, num_inference_steps=2)


def test_guidance_with_conditions_that_are_no_tensors_and_short_nulls():
    def model(x, t, class_labels=None, text=None, **kwargs):
        assert kwargs.get("flag", True) is True
        return x * 0

    labels = torch.tensor([0, 1])
    args = {"num_inference_steps": 2, "guidance_scale": 2.0}
    y, null = {"class_labels": labels, "flag": True}, {"class_labels": torch.tensor([4, 4])}
    D.sample(model, ddim(), y, SHAPE, null_condition=null, **args)
    with pytest.raises(ValueError, match="one label or 2 rows; got 1 rows"):
        D.sample(model, ddim(), labels, SHAPE, null_condition=torch.tensor([4]), **args)


def test_set_of_another_model_or_protocol_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    make_set(path)
    other = tiny_unet()
    with torch.no_grad():
        other.conv_in.weight += 1
    with pytest.raises(ValueError, match="another model"):
        make_set(path, other)
    with pytest.raises(ValueError, match="another seed"):
        make_set(path, seed=1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        make_set(path)


def test_a_set_with_nan_is_never_kept_and_what_came_before_it_is(tmp_path):
    path, model = tmp_path / "a.safetensors", tiny_unet()
    whole, _ = make_set(tmp_path / "b.safetensors")
    forward = model.forward

    def diverging(x, t, class_labels=None, **kwargs):
        out = forward(x, t, class_labels=class_labels, **kwargs).sample
        out[class_labels == 3] = torch.nan
        return (out,)

    model.forward = diverging
    with pytest.raises(
        ValueError, match=r"00000002\.safetensors is not written: images\[1\] holds"
    ):
        make_set(path, model)  # the second of the batch that begins with the third image
    assert [p.name for p in (tmp_path / "a.safetensors.parts").iterdir()] == [
        "00000000.safetensors"
    ]
    model.forward = forward
    assert torch.equal(make_set(path, model)[0], whole)
    # what an earlier version kept
    tensors = {"images": whole.clone(), "labels": torch.tensor([0, 1, 2, 3, 0])}
    tensors["images"][4, 0, 0, 0] = torch.nan
    with safe_open(path, "pt") as f:
        save_file(tensors, path, f.metadata())
    with pytest.raises(ValueError, match=r"images\[4\] holds NaN .*delete it and make it again"):
        make_set(path, model)


def test_unknown_prediction_type_and_reduction_are_named():
    x, y = data()
    with pytest.raises(ValueError, match="'sample'"):
        D.denoising_loss(Recorder(), x, y, schedule("sample"), generator=gen())
    with pytest.raises(ValueError, match="'sample'"):
        D.gaussian_forget_loss(Recorder(), x.shape, y, schedule("sample"))
    with pytest.raises(ValueError, match="reduction"):
        D.denoising_loss(Recorder(), x, y, schedule(), reduction="none", generator=gen())
