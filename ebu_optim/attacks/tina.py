"""TINA (arXiv 2603.17828): inversion without text.

DDIM inverts a picture of the target to noise under the empty prompt. Each point is refined until
the model's own step leads from it to the point before. The model then draws from that noise, again
under the empty prompt. Text plays no part in this attack.

A control accompanies the figures: an exact inversion reproduces any picture, even one that no model
learned. If the control is reproduced as well as the target, a high P_f shows only that the sampler
can be inverted, and nothing about what the model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.losses import predict
from ..diffusion.schedules import prediction_type
from ..metrics.images import to_uint8
from ..metrics.intervals import estimate
from ..modules import stream
from .found import SHOWN, Found

if TYPE_CHECKING:
    from .attacks import Attack

STEPS, REFINEMENTS, RATE = 50, 25, 1e-3
PIECES = 8  # pieces per side of a control picture

Noise = Callable[[Tensor, int], Tensor]


def tina(attack: Attack) -> Found:
    """P_f of the redrawn pictures of the target, and the errors of target and control."""
    args, model = attack.args, attack.model
    target = attack.looks["target"].tensors["latents"][: args.attack_images]
    pixels = attack.base.pictures(target)
    control = model.family.to_latents(model.vae, in_pieces(pixels, args.seed))
    settings = {"steps": args.tina_steps, "refinements": args.tina_refinements}
    rebuilt = {}
    for name, latents in (("target", target), ("control", control)):
        parts = [
            back_and_forth(model, part, **settings)
            for part in tqdm(latents.split(args.sample_batch_size), f"TINA, {name}")
        ]
        rebuilt[name] = torch.cat(parts)
    pictures = model.pictures(rebuilt["target"])
    values = {
        "tina": estimate(attack.judge.score(pictures), seed=args.seed),
        "tina_error": estimate(error(rebuilt["target"], target), seed=args.seed),
        "tina_control_error": estimate(error(rebuilt["control"], control), seed=args.seed),
    }
    shown = model.pictures(rebuilt["control"][:SHOWN])
    return Found(
        values,
        {**settings, "learning_rate": RATE, "images": len(target)},
        {"pictures tina": to_uint8(pictures[:SHOWN]), "pictures tina control": to_uint8(shown)},
    )


def in_pieces(pictures: Tensor, seed: int) -> Tensor:
    """The pictures (n, C, H, W), cut into 8 x 8 pieces in random order (2 x 2 if 8 does not divide
    the sides)."""
    n, c, h, w = pictures.shape
    side = PIECES if h % PIECES == w % PIECES == 0 else 2
    cut = pictures.reshape(n, c, side, h // side, side, w // side).permute(0, 2, 4, 1, 3, 5)
    order = torch.randperm(side * side, generator=stream(seed, 0))
    mixed = cut.flatten(1, 2)[:, order].unflatten(1, (side, side))
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def error(found: Tensor, given: Tensor) -> Tensor:
    """The mean squared error of each picture, divided by its variance, (n,)."""
    spread = given.flatten(1).var(1, unbiased=False)
    return (found - given).square().flatten(1).mean(1) / spread


def back_and_forth(model: Any, latents: Tensor, *, steps: int, refinements: int) -> Tensor:
    """Latents (n, C, H, W) on the CPU, inverted and redrawn under the empty prompt."""
    told = model.told(model.null.expand(len(latents), *model.null.shape[1:]))
    denoiser, kind = model.denoiser(), prediction_type(model.schedule)
    alphas, end, times = _times(model, steps)

    def noise(z: Tensor, t: int) -> Tensor:
        at = torch.full((len(z),), t, device=z.device)
        out = predict(denoiser, z, at, told, model.schedule).float()
        a = alphas[t]
        return out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z

    levels = [end, *(alphas[t] for t in times)]
    z = invert(noise, latents.to(model.device), times, levels, refinements)
    return redrawn(noise, z, times, levels).cpu()


def _times(model: Any, steps: int) -> tuple[Tensor, Tensor, list[int]]:
    """alpha-bar of every timestep, alpha-bar after the last step, and DDIM's timesteps, rising."""
    sampler = type(model.sampler).from_config(model.sampler.config)
    sampler.set_timesteps(steps)
    alphas = sampler.alphas_cumprod.to(model.device, torch.float32)
    end = getattr(sampler, "final_alpha_cumprod", alphas[0]).to(alphas)
    return alphas, end, sampler.timesteps.flip(0).tolist()


def invert(
    noise: Noise, z: Tensor, times: list[int], levels: list[Tensor], refinements: int
) -> Tensor:
    r"""DDIM from data to noise, where each point is a fixed point of its own step.

    .. math:: f(z_t) = \sqrt{a_t / a_s}\, z_s + (\sqrt{1 - a_t} - \sqrt{a_t / a_s}
              \sqrt{1 - a_s})\, \epsilon(z_t, t), \qquad z_t = f(z_t)

    The search starts at f of the point before, and AdamW minimises :math:`\|f(z_t) - z_t\|^2`.

    Args:
        noise: (z, t) -> the predicted noise.
        levels: alpha-bar of the data, then of each of `times`.
    """
    for t, a_s, a_t in zip(times, levels, levels[1:], strict=False):
        ratio = (a_t / a_s).sqrt()
        step = (1 - a_t).sqrt() - ratio * (1 - a_s).sqrt()
        before = z

        def f(x: Tensor, before: Any = before, ratio: Any = ratio, step: Any = step, t: int = t):  # type: ignore[no-untyped-def]
            return ratio * before + step * noise(x, t)

        with torch.no_grad():
            z = f(before)
        z = z.detach().requires_grad_()
        optimizer = torch.optim.AdamW([z], lr=RATE)
        for _ in range(refinements):
            with torch.enable_grad():
                loss = (f(z) - z).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = z.detach()
    return z


@torch.no_grad()
def redrawn(noise: Noise, z: Tensor, times: list[int], levels: list[Tensor]) -> Tensor:
    """DDIM from noise to data."""
    for t, a_t, a_s in zip(times[::-1], levels[:0:-1], levels[-2::-1], strict=True):
        e = noise(z, t)
        z = (a_s / a_t).sqrt() * (z - (1 - a_t).sqrt() * e) + (1 - a_s).sqrt() * e
    return z
