"""The training sets of a run, made once and kept in --sets_dir: text embeddings, latents, Fisher.

The name of each file ends in a hash of everything that it depends on. Runs with other prompts or
methods can therefore share a folder. An interrupted run continues sampling where it stopped.
Latents are the sampler's last ones (not decoded and encoded again); for images from a folder they
are the mode of the VAE's posterior.
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
    """The sets of a run.

    Attributes:
        forget, replayed: numbers of prompts.
        replay, own, surrogate: latents (n, C, H, W) and the numbers of their prompts (n,); None if
            the method does not need the set.
    """

    forget: list[int]
    replayed: list[int]
    replay: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor] | None
    surrogate: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """The options of the training sets."""

    group: ClassVar[str] = "sets"

    sets_dir: Path | None = option(
        None, help="Folder for the sets, which runs may share. Default: sets in the output folder."
    )
    surrogate: Literal["prompt", "folder", "pixels", "gaussian", "analytic"] = option(
        "prompt",
        help="What the model shall generate for the prompt to forget: images of the surrogate "
        "prompt, images of a folder, uniform noise through the VAE (pixels), Gaussian latents "
        "(gaussian), or Gaussian latents in closed form (analytic).",
    )
    surrogate_dir: Path | None = option(None, help="Folder of images for --surrogate folder.")
    surrogate_images: int = option(100, help="Images to generate of the surrogate.")
    replay_images: int = option(
        200, help="Images to generate of the prompts to remember, in total."
    )
    forget_images: int = option(
        100,
        help="Images to generate of the prompts to forget, for methods that learn from them "
        "(SalUn, GA, --forget_loss relabel).",
    )
    forget_dir: Path | None = option(
        None, help="Folder of images of the concept to forget, instead of generated ones."
    )
    num_inference_steps: int = option(50, help="Steps of each image of the sets.")
    guidance_scale: float | None = option(
        None, help="Guidance scale of each image of the sets. Default: that of the model's family."
    )
    sample_batch_size: int = option(4, help="Images that are generated at once.")
    fisher_images: int = option(100, help="Images of the replay set on which F is estimated.")
    fisher_timesteps: int = option(8, help="Timesteps per image for F; an even number.")

    def check_sets(self) -> None:
        """Check the values.

        Raises:
            InputError: a value is out of range, or a folder is missing or has no image.
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
    """For each set to sample: the number of images, and passes per image and step (guidance: 2)."""
    guided = looked.family.passes(looked.unet, args.guidance_scale)
    return [
        (n, guided if _guided(labels, prompts) else 1)
        for n, labels, folder in kinds(args, prompts).values()
        if labels and folder is None
    ]


def passes(args: Any, looked: Looked, prompts: Prompts) -> int:
    """The number of passes through the denoiser to sample the sets."""
    return sum(n * each for n, each in sampled(args, looked, prompts)) * args.num_inference_steps


def made_of(args: Any, folder: Path, prompts: Prompts) -> dict[str, str]:
    """Hashes of what a run learns from: the pipeline's parts, the prompts and the given images."""
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
    """The sets that the method needs, sampled or read.

    Under mixed precision a 16-bit copy of the denoiser samples, with --quantize a quantized copy;
    `unet` is not moved then.

    Args:
        prompts: the prompts of the run.
        unet: the denoiser with the pretrained weights.
        table: the conditions of all prompts.
        base: the hash of the pretrained weights.

    Raises:
        InputError: images cannot be read, or a set has NaN or Inf.
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
        if args.mixed_precision != "no":  # autocast would keep such a copy next to the original
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
    assert made.replay  # every method with a Fisher has a replay set
    latents, labels = made.replay
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))
    rows = rows[: args.fisher_images]
    # only the replayed prompts, so that F does not depend on the prompt to forget
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
    """For each set: the number of images, the prompts (none: noise), and a folder of images."""
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
    """Whether guidance has an effect: it has none on the empty prompt."""
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
    # a distinct seed for each set, so that no two sets start from the same noise
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
    """Latents of a folder's images, or of uniform noise; frees the VAE afterwards."""
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
    """The images as (n, 3, size, size) float32 in [-1, 1].

    Args:
        where: the source of the images, for messages.
    """
    items = [Image(p, 0, p.name) for p in files]
    stack, _, _ = decode(items, ["image"], where, resolution=size, skip=False)
    return stack.float().div_(127.5).sub_(1)
