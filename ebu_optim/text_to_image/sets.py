"""What a run learns from, made once and kept in --sets_dir: text embeddings, latents, the Fisher.

The name of each file ends in a hash of all that it depends on, so that runs with other prompts or
methods can share a folder, and nothing is taken for something else. Sampling goes on where it was
interrupted. Latents are those that the sampler ends with (not decoded and encoded again), and for
images from a folder the mode of the VAE's posterior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .. import DiagonalFisher
from ..diffusion import (
    FisherBatches,
    fisher_loss,
    sample_set,
    surrogate_noise,
)
from ..diffusion.objectives import NOISE, kind, needs_own_images
from ..diffusion.sampling import scheduler_protocol
from ..errors import InputError
from ..files import load_tensors, save_tensors
from ..images import ENDINGS, image_files
from ..manifest import config_of, contents, key, of_model
from ..training.fields import option
from ..training.method import needs
from ..training.sources import Item as Image
from ..training.sources import decode
from .conditions import conditions, halved, in_one_line, to_latents
from .families import Conditions
from .modules import Prompted, halve_frozen
from .pipelines import Looked, parts
from .prompts import Prompts
from .quantized import quantize
from .save import DTYPES

__all__ = [
    "Made",
    "SetOptions",
    "conditions",
    "fisher",
    "halved",
    "kinds",
    "made_of",
    "make",
    "passes",
    "read_images",
    "sampled",
]


class Made(NamedTuple):
    """Numbers of prompts; pairs of latents (n, C, H, W) and numbers of prompts (n,), or None."""

    forget: list[int]
    replayed: list[int]
    replay: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor] | None
    surrogate: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """What is learned from."""

    group: ClassVar[str] = "sets"

    sets_dir: Path | None = option(
        None, help="Folder for the sets, which runs may share. Default: sets in the output folder."
    )
    surrogate: Literal["prompt", "folder", "pixels", "gaussian", "analytic"] = option(
        "prompt",
        help="What the forgotten prompt shall draw: images of the surrogate prompt, images "
        "of a folder, uniform noise through the VAE (pixels), Gaussian latents, or "
        "these in closed form (analytic).",
    )
    surrogate_dir: Path | None = option(None, help="Folder of images for --surrogate folder.")
    surrogate_images: int = option(100, help="Images that are drawn of the surrogate.")
    replay_images: int = option(
        200, help="Images that are drawn of the prompts to remember, all together."
    )
    forget_images: int = option(
        100,
        help="Images that are drawn of what is forgotten, for methods that learn from them "
        "(SalUn, GA, --forget_loss relabel).",
    )
    forget_dir: Path | None = option(
        None, help="Folder of images of what is forgotten, in place of drawn ones."
    )
    num_inference_steps: int = option(50, help="Steps of each image of the sets.")
    guidance_scale: float | None = option(
        None, help="Guidance of each image of the sets. Default: that of the model's family."
    )
    sample_batch_size: int = option(4, help="Images that are drawn at once.")
    fisher_images: int = option(100, help="Images of the replay set that F is estimated on.")
    fisher_timesteps: int = option(8, help="Timesteps of each image for F; an even number.")

    def check_sets(self) -> None:
        """Raises:
        InputError: a number that cannot be; a folder that is missing or holds no image.
        """
        for name in (
            "surrogate_images",
            "replay_images",
            "forget_images",
            "num_inference_steps",
            "sample_batch_size",
            "fisher_images",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be >= 1; got {getattr(self, name)}")
        scale = self.guidance_scale
        if scale is not None and not 0 <= scale < math.inf:
            raise InputError(f"--guidance_scale must be finite, >= 0; got {scale}")
        if self.fisher_timesteps < 2 or self.fisher_timesteps % 2:
            raise InputError(f"--fisher_timesteps must be even, >= 2; got {self.fisher_timesteps}")
        if (self.surrogate == "folder") != (self.surrogate_dir is not None):
            raise InputError("--surrogate folder and --surrogate_dir go together")
        for name in ("surrogate_dir", "forget_dir"):
            folder = getattr(self, name)
            if folder is not None and not image_files(folder):
                raise InputError(f"--{name} {folder}: no image ({', '.join(ENDINGS)}) in it")


def sampled(args: Any, looked: Looked, prompts: Prompts) -> list[tuple[int, int]]:
    """For each set that is sampled: how many images, and passes of each a step (guidance: 2)."""
    guided = looked.family.passes(looked.unet, args.guidance_scale)
    return [
        (n, guided if _guided(labels, prompts) else 1)
        for n, labels, folder in kinds(args, prompts).values()
        if labels and folder is None
    ]


def passes(args: Any, looked: Looked, prompts: Prompts) -> int:
    """How often the denoiser is run to sample the sets."""
    return sum(n * each for n, each in sampled(args, looked, prompts)) * args.num_inference_steps


def made_of(args: Any, folder: Path, prompts: Prompts) -> dict[str, str]:
    """What a run learns from, by content: the pipeline's parts, the prompts and images given."""
    given = [f for d in (args.surrogate_dir, args.forget_dir) if d for f in image_files(d)]
    said = prompts.texts, prompts.forget, prompts.surrogate, prompts.remember
    instead = [[i, others] for i, others in sorted(prompts.instead.items())]
    return {
        **parts(folder, args.variant),
        "prompts": key(*said, instead),
        "images": contents(given),
    }


@in_one_line()
def make(
    args: Any,
    looked: Looked,
    folder: Path,
    prompts: Prompts,
    unet: Any,
    table: Tensor | Conditions,
    base: str,
    device: Any,
) -> Made:
    """The sets that the method needs, sampled or read. `unet` holds the pretrained weights, `base`
    is their hash, `table` the conditions of all prompts. Under mixed precision a copy in 16 bits
    samples, with --quantize a quantized one, and `unet` stays where it is.

    Raises:
        InputError: unreadable images; NaN or Inf in what was made of them.
    """
    table = Conditions.of(table)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    wanted = kinds(args, prompts)
    for name, (number, labels, images) in wanted.items():
        if images is not None or not labels:  # before the denoiser is on the device
            latents = _encoded(args, looked, folder, images, number, device)
            pick = torch.arange(len(latents)) % len(prompts.forget)
            made[name] = latents, torch.tensor(prompts.forget)[pick]
    if sampled(args, looked, prompts):
        if args.mixed_precision != "no" or args.quantize:
            unet = copy.deepcopy(unet).requires_grad_(False)
        if args.mixed_precision != "no":  # as autocast rounds, which would keep a copy beside it
            halve_frozen(unet, DTYPES[args.mixed_precision])
        if args.quantize:
            quantize(unet, args.quantize, looked.family.units, device)
        unet = unet.to(device)
    for name, (number, labels, _) in wanted.items():
        if name not in made:
            made[name] = _sampled(
                args, looked, prompts, unet, table, base, device, name, number, labels
            )
    return Made(
        prompts.forget, prompts.remember, made.get("replay"), made.get("own"), made.get("surrogate")
    )


@in_one_line()
def fisher(args: Any, made: Made, looked: Looked, unet: Any, table: Conditions) -> Any:
    """F of the denoiser's trained weights over the replay set, by parameter."""
    assert made.replay  # whatever has a Fisher remembers
    latents, labels = made.replay
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    rows = rows[: args.fisher_images]
    # the replayed prompts alone: F is not another where another prompt is forgotten
    number = {c: i for i, c in enumerate(made.replayed)}
    model = Prompted(unet, table.rows(made.replayed), looked.family).to(unet.device)
    batches = FisherBatches(
        latents[rows],
        torch.tensor([number[c] for c in labels[rows].tolist()]),
        looked.scheduler,
        timesteps=args.fisher_timesteps,
        batch_size=1,
        seed=args.seed,
        device=unet.device,
    )
    name = key(of_model(model), sorted(model.trained()), batches.protocol, args.reduction)
    estimate = DiagonalFisher.estimate(
        model,
        fisher_loss(looked.scheduler, reduction=args.reduction),
        batches,
        method="loop",
        path=args.sets_dir / f"fisher-{name}.safetensors",
    )
    return estimate.for_model(model)


def kinds(args: Any, prompts: Prompts) -> dict[str, tuple[int, list[int], Path | None]]:
    """For each set: how many images, of which prompts (none: noise), or of which folder."""
    forgets, found = kind(args), {}
    if forgets == "surrogate" and args.surrogate not in NOISE:
        labels = prompts.surrogate if args.surrogate == "prompt" else []
        found["surrogate"] = (args.surrogate_images, labels, args.surrogate_dir)
    if needs_own_images(args):
        found["own"] = (args.forget_images, prompts.forget, args.forget_dir)
    if "remember" in needs(args) and forgets != "adapter":
        found["replay"] = (args.replay_images, prompts.remember, None)
    return found


def _guided(labels: list[int], prompts: Prompts) -> bool:
    """Guidance of the empty prompt away from itself is nothing."""
    return set(labels) != {prompts.null}


def _sampled(
    args: Any,
    looked: Looked,
    prompts: Prompts,
    unet: Any,
    table: Conditions,
    base: str,
    device: Any,
    name: str,
    number: int,
    labels: list[int],
) -> tuple[Tensor, Tensor]:
    used = [*labels, prompts.null]
    told, scheduler = table.rows(used), looked.family.sampler(looked.scheduler)
    texts = [prompts.texts[i] for i in used]
    # no set of any seed begins at the noise of another's
    seed = 3 * args.seed + ("replay", "surrogate", "own").index(name)
    bits = f"{args.mixed_precision}, {args.quantize}" if args.quantize else args.mixed_precision
    how = [
        texts,
        number,
        looked.latents,
        args.num_inference_steps,
        args.guidance_scale,
        seed,
        bits,
        args.sample_batch_size,
        told.hash(),
        scheduler_protocol(scheduler),
    ]
    path = args.sets_dir / f"{name}-{key(base, config_of(unet), how)}.safetensors"
    latents, rows = sample_set(
        path,
        Prompted(unet, told, looked.family).to(device),
        scheduler,
        torch.arange(number) % len(labels),
        looked.latents,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=looked.family.away(looked.unet, args.guidance_scale)
        if _guided(labels, prompts)
        else 1.0,
        null_condition=len(labels),
        clip=False,
        batch_size=args.sample_batch_size,
        seed=seed,
        device=device,
    )
    return latents, torch.tensor(labels)[rows]


def _encoded(
    args: Any,
    looked: Looked,
    folder: Path,
    images: Path | None,
    number: int,
    device: Any,
) -> Tensor:
    """Latents of a folder's images, or of uniform noise; the VAE is gone again afterwards."""
    size = looked.resolution
    given = image_files(images) if images else []
    vae_hash = parts(folder, args.variant)["vae"]
    name = key(vae_hash, contents(given), number if images is None else 0, size, args.seed)
    path = args.sets_dir / f"encoded-{name}.safetensors"
    if not path.exists():
        if images is None:
            g = torch.Generator().manual_seed(args.seed)
            pixels = surrogate_noise("uniform", (number, 3, size, size), generator=g)
        else:
            pixels = read_images(given, str(images), size)
        save_tensors(path, {"latents": to_latents(args, looked, folder, pixels, device)}, {})
    return load_tensors(path)[0]["latents"]


def read_images(files: Sequence[Path], where: str, size: int) -> Tensor:
    """(n, 3, size, size) in [-1, 1]; `where` they come from is for errors."""
    items = [Image(p, 0, p.name) for p in files]
    stack, _, _ = decode(items, ["image"], where, resolution=size, skip=False)
    return stack.float().div_(127.5).sub_(1)
