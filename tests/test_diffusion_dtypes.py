"""The shape of a prediction and the dtypes of latents, models and anchors, in every loss."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebu_optim import EBUOptimizer
from ebu_optim import diffusion as D

from .by_hand import BAR, KINDS, Constant, gen
from .models import schedule


def every_loss(times: int, channels: int, variance: str):
    """Each loss, and what it is by hand with mean reduction: labels 1 and 3, null and other 7."""
    scheduler = diffusers.DDPMScheduler(variance_type=variance)
    model, teacher = Constant(0.25, times), Constant(0.0, times)
    x = torch.randn(2, channels, 2, 2, generator=gen(1))
    noise = torch.randn(x.shape, generator=gen(2))
    y, other, t = torch.tensor([1, 3]), torch.tensor([7, 7]), torch.tensor([10, 900])
    label = np.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    mean, known = {"reduction": "mean"}, {"scheduler": scheduler}
    drawn = torch.randn(x.shape, generator=gen(3)).double().numpy()
    best = np.sqrt(1 - BAR[t.numpy()]).reshape(2, 1, 1, 1) * drawn
    eps = noise.double().numpy()
    yield (
        lambda: D.denoising_loss(model, x, y, scheduler, timesteps=t, noise=noise, **mean),
        np.square(label + 0.25 - eps).mean(),
    )
    yield (
        lambda: D.gaussian_forget_loss(
            model, x.shape, y, scheduler, timesteps=t, generator=gen(3), **mean
        ),
        np.square(label + 0.25 - best).mean(),
    )
    yield lambda: D.distillation_loss(model, teacher, x, y, scheduler, **mean), 0.25**2
    yield (
        lambda: D.relabel_loss(model, x, y, other, scheduler, teacher=teacher, **mean),
        np.square(label + 0.25 - 7).mean(),
    )
    yield (
        lambda: D.esd_loss(model, teacher, x, t, y, other, **known),
        np.square(label + 0.25 - (7 - (label - 7))).mean(),
    )
    yield (
        lambda: D.anchor_loss(model, teacher, x[:1], t[:1], y, **known),
        0.25**2,
    )
    batch = {"x": x, "labels": y, "t": t[:, None], "noise": noise[:, None]}
    yield (
        lambda: D.fisher_loss(scheduler, reduction="mean")(model, batch).mean(),
        np.square(label + 0.25 - eps).mean(),
    )


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_losses_take_the_first_channels_where_the_variance_is_learned(times, channels, variance):
    for loss, expected in every_loss(times, channels, variance):
        if times == 1 or (times == 2 and variance != "fixed_small"):
            assert float(loss()) == pytest.approx(float(expected), rel=1e-5)
            continue
        with pytest.raises(ValueError, match=rf"shape \(2, {times * channels}, 2, 2\) for x_t"):
            loss()


def test_a_variance_with_no_scheduler_to_tell_it_is_refused():
    model, x, t = Constant(0.0, 2), torch.zeros(2, 1, 2, 2), torch.tensor([1, 2])
    y = torch.tensor([1, 3])
    for loss in (
        lambda: D.esd_loss(model, model, x, t, y, y),
        lambda: D.anchor_loss(model, model, x[:1], t[:1], y),
    ):
        with pytest.raises(ValueError, match=r'Twice the channels.*"learned"'):
            loss()


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_t_is_right_to_the_last_place_of_its_dtype(dtype, kind, n):
    x = (torch.rand(n, 1, 16, 16, generator=gen(1)) * 2 - 1).to(dtype)
    noise = torch.randn(x.shape, generator=gen(2)).to(dtype)
    seen = []

    def model(x_t, t, class_labels):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    for first in (0, 3, 400, 990):
        t = torch.arange(first, first + n)
        loss = D.denoising_loss(
            model, x, t, schedule(kind), timesteps=t, noise=noise, reduction="mean"
        )
        signal, spread = (np.sqrt(v).reshape(-1, 1, 1, 1) for v in (BAR[t], 1 - BAR[t]))
        a, b = (v.double().numpy() for v in (x, noise))
        x_t = seen[-1]
        # a float32 schedule is right to 1e-7, its 1 - bar alpha at t = 0 to 3e-4
        places = {"rtol": max(torch.finfo(dtype).eps, 1e-5), "atol": 1e-5}
        np.testing.assert_allclose(x_t.double().numpy(), signal * a + spread * b, **places)
        assert x_t.dtype == dtype
        target = b if kind == "epsilon" else signal * b - spread * a
        assert float(loss) == pytest.approx(np.square(target).mean(), rel=1e-4)
        assert (x_t != x).double().mean() > 0.8  # there is noise


class HalfNet(nn.Module):
    """A conv with a dtype, as diffusers' models have; beside it a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.frozen = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
        self.frozen.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.weight.dtype

    def forward(self, x, t, class_labels):
        return self.frozen(self.conv(x))


@pytest.mark.parametrize("held_on", [None, "cpu"])
@pytest.mark.parametrize("anchor_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [False, True])
def test_the_anchored_teacher_is_the_rounded_model_in_every_dtype(anchor_dtype, held_on, given):
    halves = (torch.float16, torch.bfloat16, torch.float32)
    for dtype, latents, n in itertools.product(halves, halves, (1, 2)):
        model = HalfNet().to(dtype)
        start = {k: v.detach().double().numpy() for k, v in model.named_parameters()}
        anchor = {p: p.detach().clone() for p in model.parameters()} if given else None
        opt = EBUOptimizer(
            torch.optim.SGD(model.conv.parameters(), lr=0.5),
            fisher=None if given else "online",
            anchor={p: anchor[p] for p in model.conv.parameters()} if anchor else None,
            anchor_dtype=anchor_dtype,
            held_on=held_on,
        )
        x = torch.randn(n, 1, 4, 4, generator=gen(n)).to(latents)
        y, t = torch.zeros(n, dtype=torch.long), torch.full((n,), 500)
        teacher = D.anchored(model, opt)
        with opt.forget():
            D.denoising_loss(model, x, y, schedule(), timesteps=t, generator=gen()).backward()
        with opt.remember():
            loss = D.distillation_loss(model, teacher, x, y, schedule(), timesteps=t)
            loss.backward()
        opt.step()
        held = {"conv": anchor_dtype or dtype, "frozen": dtype}
        rounded = {
            k: torch.from_numpy(v).to(held[k.split(".")[0]]).to(dtype) for k, v in start.items()
        }
        got = teacher(x, t, class_labels=y)
        assert got.dtype == dtype
        copy = HalfNet().to(dtype)
        copy.load_state_dict(rounded)
        torch.testing.assert_close(got, copy(x.to(dtype), t, y), rtol=0, atol=0)
        by_hand = conv(x.to(dtype), rounded)
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
        np.testing.assert_allclose(got.detach().double().numpy(), by_hand, atol=tolerance, rtol=0)


def conv(x: Tensor, weights: dict[str, Tensor]) -> np.ndarray:
    """HalfNet in NumPy."""
    w = {k: v.double().numpy() for k, v in weights.items()}
    padded = np.pad(x.double().numpy()[:, 0], ((0, 0), (1, 1), (1, 1)))
    kernel = w["conv.weight"][0, 0]
    inner = sum(kernel[i, j] * padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3))
    out = w["frozen.weight"].item() * (inner + w["conv.bias"].item()) + w["frozen.bias"].item()
    return out[:, None]
