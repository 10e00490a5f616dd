"""TINA (arXiv 2603.17828): inversion without text.

DDIM inverts an image of the target to noise under the empty prompt. Each point is refined until
the model's own step leads from it to the point before. The model then generates from that noise,
again under the empty prompt. Text plays no part in this attack.

A control accompanies the figures: an exact inversion reproduces any image, even one that no model
learned. If the control is reproduced as well as the target, a high P_f shows only that the sampler
can be inverted, and nothing about what the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.flow import is_flow
from ..diffusion.losses import predict
from ..diffusion.schedules import prediction_type
from ..metrics.images import to_uint8
from ..metrics.intervals import estimate
from ..modules import stream
from .found import SHOWN, Found

if TYPE_CHECKING:
    from .attacks import Attack

STEPS, REFINEMENTS, RATE = 50, 25, 1e-3
PIECES = 8  # pieces per side of a control image

Predicted = Callable[[Tensor, float], Tensor]


def tina(attack: Attack) -> Found:
    """P_f of the regenerated images of the target, and the errors of target and control."""
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
    """The images (n, C, H, W), cut into 8 x 8 pieces in random order (2 x 2 if 8 does not divide
    the sides)."""
    n, c, h, w = pictures.shape
    side = PIECES if h % PIECES == w % PIECES == 0 else 2
    cut = pictures.reshape(n, c, side, h // side, side, w // side).permute(0, 2, 4, 1, 3, 5)
    order = torch.randperm(side * side, generator=stream(seed, 0))
    mixed = cut.flatten(1, 2)[:, order].unflatten(1, (side, side))
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def error(found: Tensor, given: Tensor) -> Tensor:
    """The mean squared error of each image, divided by its variance, (n,)."""
    spread = given.flatten(1).var(1, unbiased=False)
    return (found - given).square().flatten(1).mean(1) / spread


class Step(NamedTuple):
    r"""A step of the sampler between z_s and the noisier z_t.

    .. math:: z_t = r\, z_s + h\, f(z_t, t)

    Attributes:
        time: t.
        ratio, size: r and h.
    """

    time: float
    ratio: Tensor
    size: Tensor


def back_and_forth(model: Any, latents: Tensor, *, steps: int, refinements: int) -> Tensor:
    """Latents (n, C, H, W) on the CPU, inverted and regenerated under the empty prompt."""
    told = model.told(model.null.expand(len(latents), *model.null.shape[1:]))
    denoiser, schedule = model.denoiser(), model.schedule
    sampler = model.family.sampler(schedule)
    sampler.set_timesteps(steps)
    path = flow(sampler) if is_flow(sampler) else ddim(sampler)
    kind = "" if is_flow(sampler) else prediction_type(schedule)

    def predicted(z: Tensor, t: float) -> Tensor:
        at = torch.full((len(z),), t, device=z.device)
        out = predict(denoiser, z, at, told, schedule).float()
        if kind != "v_prediction":
            return out
        a = sampler.alphas_cumprod[int(t)].to(out)
        return a.sqrt() * out + (1 - a).sqrt() * z

    path = [Step(s.time, s.ratio.to(model.device), s.size.to(model.device)) for s in path]
    z = invert(predicted, latents.to(model.device), path, refinements)
    return redrawn(predicted, z, path).cpu()


def ddim(sampler: Any) -> list[Step]:
    """The steps of DDIM from data to noise; f is the predicted noise."""
    alphas = sampler.alphas_cumprod.float()
    end = getattr(sampler, "final_alpha_cumprod", alphas[0]).to(alphas)
    times = sampler.timesteps.flip(0).tolist()
    levels = [end, *(alphas[t] for t in times)]
    found = []
    for t, a_s, a_t in zip(times, levels, levels[1:], strict=False):
        ratio = (a_t / a_s).sqrt()
        found.append(Step(t, ratio, (1 - a_t).sqrt() - ratio * (1 - a_s).sqrt()))
    return found


def flow(sampler: Any) -> list[Step]:
    """The steps of Euler's method from data to noise; f is the predicted velocity."""
    levels, times = sampler.sigmas.float().flip(0), sampler.timesteps.flip(0).tolist()
    sizes = levels.diff()
    return [Step(t, torch.ones(()), size) for t, size in zip(times, sizes, strict=True)]


def invert(predicted: Predicted, z: Tensor, path: Sequence[Step], refinements: int) -> Tensor:
    r"""The sampler from data to noise, where each point is a fixed point of its own step.

    The search starts at :math:`r z_s + h f(z_s, t)`, and AdamW minimises
    :math:`\|r z_s + h f(z_t, t) - z_t\|^2`.
    """
    for t, ratio, size in path:
        begin = ratio * z
        with torch.no_grad():
            z = begin + size * predicted(z, t)
        z = z.detach().requires_grad_()
        optimizer = torch.optim.AdamW([z], lr=RATE)
        for _ in range(refinements):
            with torch.enable_grad():
                loss = (begin + size * predicted(z, t) - z).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        z = z.detach()
    return z


@torch.no_grad()
def redrawn(predicted: Predicted, z: Tensor, path: Sequence[Step]) -> Tensor:
    """The sampler from noise to data."""
    for t, ratio, size in reversed(path):
        z = (z - size * predicted(z, t)) / ratio
    return z
