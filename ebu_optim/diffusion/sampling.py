"""Sampling with a diffusers scheduler and classifier-free guidance, and sets cached on disk."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import require
from ..files import load_tensors, save_tensors
from ..manifest import config_of, key
from ..modules import evaluating, model_hash, stream, without_gradients
from .conditions import Condition, behind, moved, rows
from .flow import is_flow, set_timesteps
from .losses import Model, output
from .schedules import check_family


@without_gradients()
def sample(
    model: Model,
    scheduler: Any,
    condition: Condition,
    shape: tuple[int, ...],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    null_condition: Condition | int | None = None,
    clip: bool = True,
    stop_after: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Generate one image per condition.

    Args:
        model: as for :func:`denoising_loss`; put it in eval mode first.
        scheduler: a diffusers scheduler that samples (DDIMScheduler, DDPMScheduler, ...,
            FlowMatchEulerDiscreteScheduler without dynamic shifting). Its timesteps are set here.
        condition: labels (n,), or keyword arguments whose tensors have n rows; the tensors may be
            in mappings, lists and tuples.
        shape: (C, H, W) of one image.
        guidance_scale: w of eps_null + w (eps_c - eps_null), diffusers' convention, or of the
            model's own ``guide(eps_null, eps_c, w)`` if it has one; 1 runs only the conditional
            model.
        null_condition: the condition of the null branch: a label, or a condition like `condition`.
            Values without tensors are taken from the condition.
        clip: clamp the result to [-1, 1]. Do not clamp latents.
        stop_after: number of steps to take; None takes all. Then the result is x_t at
            ``scheduler.timesteps[stop_after]``, scaled as the model sees it.
        generator: for the starting noise and the sampler's own noise.

    Returns:
        (n, C, H, W) float32 images on `device`.

    Raises:
        ValueError: the scheduler has another family; the null condition does not have the
            structure of the condition; the prediction has another shape.
    """
    check_family(scheduler)
    n = rows(condition)
    if n is None:
        raise ValueError(
            "the condition holds no tensor with rows, so the number of images is unknown; give "
            "one row per image"
        )
    condition = moved(condition, device)
    guided, led = guidance_scale != 1.0, getattr(model, "guide", guide)
    if guided:
        if null_condition is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs null_condition, the condition of the "
                "unconditional branch (the label of the null class)"
            )
        if isinstance(null_condition, int):
            null_condition = torch.full((n,), null_condition, device=device)
        both = behind(moved(null_condition, device), condition, n)
    source = generator.device if generator is not None else device
    x = torch.randn((n, *shape), generator=generator, device=source).to(device)
    if is_flow(scheduler):
        set_timesteps(scheduler, num_inference_steps)
    else:
        scheduler.set_timesteps(num_inference_steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    # flow matching has no such method: the model sees the sampler's own x
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    steps = scheduler.timesteps[:stop_after]
    if progress:
        steps = require("tqdm.auto", "diffusion").tqdm(steps, desc="sampling", leave=False)
    # PNDM and others make no random draws
    draws = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if draws else {}
    for t in steps:
        x_in = scaled(x, t)
        t_in = t.to(device)
        if guided:
            two = torch.cat([x_in, x_in])
            null, out = output(model, two, t_in.expand(2 * n), both, scheduler).float().chunk(2)
            found = led(_first(null, x), _first(out, x), guidance_scale)
        else:
            out = output(model, x_in, t_in.expand(n), condition, scheduler).float()
            found = _first(out, x)
        if out.shape != x.shape and "variance_type" in vars(scheduler):  # DDPM uses the variance
            found = torch.cat([found, out[:, x.shape[1] :]], 1)
        x = scheduler.step(found, t, x, **options).prev_sample
    if len(steps) < len(scheduler.timesteps):
        x = scaled(x, scheduler.timesteps[len(steps)])
    return x.clamp(-1, 1) if clip else x


def guide(null: Tensor, text: Tensor, scale: float) -> Tensor:
    """Combine the predictions without and with a condition, in diffusers' convention."""
    return null + scale * (text - null)


def _first(out: Tensor, x: Tensor) -> Tensor:
    """Return as many channels as x has; the others are a variance."""
    return out if out.shape == x.shape else out[:, : x.shape[1]]


def scheduler_protocol(scheduler: Any) -> dict[str, Any]:
    """Return the settings that identify a scheduler, as JSON values."""
    config = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.loads(json.dumps(config, default=str, sort_keys=True))


def sample_set(
    path: str | os.PathLike[str],
    model: nn.Module,
    scheduler: Any,
    labels: Tensor,
    shape: tuple[int, ...],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    null_condition: int | None = None,
    clip: bool = True,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Return a replay set (the kept labels) or a surrogate set (the null label), cached on disk.

    The file is a safetensors file with "images" and "labels". Its metadata holds the protocol: a
    hash of the weights, the sampler and its settings, and the seed. Finished batches are saved next
    to it, so an interrupted call can be continued. Every batch has its own seed, so the result is
    the same. An existing file that fits the call is loaded.

    Args:
        path: the path of the .safetensors file.
        labels: (n,) class label of every image to sample.
        clip: as for :func:`sample`.

    Returns:
        images (n, C, H, W) float32 and labels (n,) int64, on the CPU.

    Raises:
        ValueError: `path` holds a set of another model or protocol, or is incomplete.
    """
    path = Path(path)
    labels = labels.cpu().long()
    meta = {
        "kind": "ebu_optim sample set",
        "model": model_hash(model),
        "config": key(config_of(model)),
        "sampler": type(scheduler).__name__,
        "scheduler": scheduler_protocol(scheduler),
        "num_inference_steps": num_inference_steps,
        "guidance_scale": float(guidance_scale),
        "null_condition": null_condition,
        "batch_size": batch_size,
        "seed": seed,
        "shape": list(shape),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:16],
        **({} if clip else {"clip": False}),
    }

    def load(file: Path) -> dict[str, Tensor]:
        tensors, found = load_tensors(file)
        different = [k for k in meta if found.get(k) != meta[k]]
        if different:
            k = different[0]
            raise ValueError(
                f"{file} is a set of another {k} ({found.get(k)!r}, this call has {meta[k]!r}); "
                "give another path, or delete the file to sample again"
            )
        return tensors

    parts = path.with_name(path.name + ".parts")
    if path.exists():
        tensors = load(path)
        shutil.rmtree(parts, ignore_errors=True)  # left by a kill just before the end
        return tensors["images"], tensors["labels"]

    tqdm = require("tqdm.auto", "diffusion").tqdm
    images = []
    with evaluating(model):
        for i in tqdm(range(0, len(labels), batch_size), desc=f"sampling {path.name}"):
            part = parts / f"{i:08d}.safetensors"
            if part.exists():
                batch = load(part)["images"]
            else:
                batch = sample(
                    model,
                    scheduler,
                    labels[i : i + batch_size],
                    shape,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    null_condition=null_condition,
                    clip=clip,
                    device=device,
                    generator=stream(seed, i),
                ).cpu()
                save_tensors(part, {"images": batch}, meta)
            images.append(batch)
    tensors = {"images": torch.cat(images), "labels": labels}
    save_tensors(path, tensors, meta)
    shutil.rmtree(parts, ignore_errors=True)
    return tensors["images"], tensors["labels"]
