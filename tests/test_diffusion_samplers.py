"""Samplers on the way, by how they scale, step and draw, against what they must give by hand."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from ebu_optim import diffusion as D

from .by_hand import BAR, KINDS, Constant, column, gen, levels

# diffusers' schedulers give tensors to NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SAMPLERS = [
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDPM",
        "PNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "LMSDiscrete",
        "KDPM2Discrete",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "UniPCMultistep",
        "DEISMultistep",
    )
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_partly_denoised_is_x_t_as_the_model_knows_it(name, kind):
    """All images are the constant c: then x_t ~ N(sqrt(bar alpha) c, 1 - bar alpha), and the model
    that knows it keeps every sampler on the way, however few steps it takes."""
    scheduler = getattr(diffusers, name)(prediction_type=kind, **plain(name))
    c = 0.5

    def model(x, t, class_labels):
        signal, spread = (column(v, x) for v in levels(t.double().numpy()))
        eps = (x - signal * c) / spread
        return eps if kind == "epsilon" else signal * eps - spread * c

    seen = set()
    for seed in range(12):
        n = 1 + seed % 2
        x_t, t = D.partly_denoised(
            model,
            scheduler,
            torch.zeros(n, dtype=torch.long),
            1,
            (4, 24, 24),
            num_inference_steps=12,
            generator=gen(seed),
        )
        at = float(t[0])
        assert t.shape == (n,)
        assert x_t.shape == (n, 4, 24, 24)
        assert at in [float(s) for s in scheduler.timesteps]
        assert t.dtype == (torch.int64 if at == int(at) else torch.float32)
        signal, spread = levels(np.array(at))
        for image in x_t.double():
            assert float(image.mean()) == pytest.approx(signal * c, abs=0.06)
            assert float(image.std()) == pytest.approx(spread, abs=0.06)
        seen.add(at)
    assert len(seen) > 3
    assert min(seen) < 500 < max(seen)


def plain(name: str) -> dict[str, object]:
    """DDPM's betas, which are not everywhere the default, and no clipping."""
    clip = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return {"beta_start": 1e-4, "beta_end": 2e-2, **clip}


def test_each_of_a_sampler_s_own_steps_may_be_the_last_and_has_its_bin():
    heun = diffusers.HeunDiscreteScheduler()
    found = [
        D.partly_denoised(
            lambda x, t, class_labels: x,
            heun,
            torch.zeros(1, dtype=torch.long),
            1,
            (1, 1, 1),
            num_inference_steps=5,
            earliest=6,
            within_bin=True,
            generator=gen(seed),
        )[1]
        for seed in range(60)
    ]
    assert len(heun.timesteps) == 9
    assert all(t.dtype == torch.int64 for t in found)
    drawn = [int(t) for t in found]
    assert 0 <= min(drawn) < 60
    assert 340 < max(drawn) < 400  # the calls 6, 7 and 8 are in the last two of five bins
    with pytest.raises(ValueError, match=r"earliest must be in \[0, 9\)"):
        D.partly_denoised(
            lambda x, t, class_labels: x,
            heun,
            torch.zeros(1, dtype=torch.long),
            1,
            (1, 1, 1),
            num_inference_steps=5,
            earliest=9,
        )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [s for s in SAMPLERS if "KDPM2" not in s])  # slow to set up
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samplers_take_the_first_channels(name, channels, guidance):
    kind = getattr(diffusers, name)
    learned = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False).config
    args = {
        "shape": (channels, 2, 2),
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "null_condition": 0,
        "clip": False,
    }
    y = torch.tensor([1, 2])

    def drawn(model, config):
        return D.sample(model, kind.from_config(config), y, generator=gen(), **args)

    def both(x, t, class_labels):  # -1 is the least variance, which fixed_small is too
        return torch.cat([mean(x, t, class_labels), torch.full_like(x, -1.0)], 1)

    mean = Constant(0.0, 1)

    fixed = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False).config
    if "variance_type" in dict(kind().config) and name != "DDPMScheduler":
        fixed = {**fixed, "variance_type": None}  # of DPMSolver's: learned or none
    torch.testing.assert_close(drawn(both, learned), drawn(mean, fixed))
    with pytest.raises(ValueError, match="the model predicts shape"):
        drawn(both, fixed)


def test_ddpm_draws_with_the_predicted_variance_of_the_condition():
    ddpm = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)

    def model(x, t, class_labels):
        label = column(class_labels, x)
        return torch.cat([x * 0 + label, x * 0 + label / 10], 1)

    got = D.sample(
        model,
        ddpm,
        torch.tensor([1, 2]),
        (1, 2, 2),
        num_inference_steps=2,
        guidance_scale=3.0,
        null_condition=5,
        clip=False,
        generator=gen(),
    )
    g = gen()
    x = torch.randn((2, 1, 2, 2), generator=g).double().numpy()
    label = np.array([1.0, 2.0]).reshape(2, 1, 1, 1)
    eps = 5 + 3 * (label - 5)
    for t, before in ((500, BAR[0]), (0, 1.0)):
        alpha, beta = BAR[t] / before, 1 - BAR[t] / before
        x0 = (x - np.sqrt(1 - BAR[t]) * eps) / np.sqrt(BAR[t])
        x = (np.sqrt(before) * beta * x0 + np.sqrt(alpha) * (1 - before) * x) / (1 - BAR[t])
        if t:
            least, most = math.log((1 - before) / (1 - BAR[t]) * beta), math.log(beta)
            share = (label / 10 + 1) / 2
            drawn = torch.randn((2, 1, 2, 2), generator=g).double().numpy()
            x = x + np.exp((share * most + (1 - share) * least) / 2) * drawn
    np.testing.assert_allclose(got.numpy(), x, rtol=1e-3, atol=1e-3)
