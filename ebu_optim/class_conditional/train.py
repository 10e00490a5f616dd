"""Train the class-conditional diffusion model that later forgets.

The recipe is that of the DDPM code base: Adam 2e-4, clipping at 1.0, batch 128, conditions replaced
by the null class with probability 0.1, antithetic timesteps, squared error summed over C, H, W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import training
from ..diffusion import denoising_loss, model_hash
from ..errors import InputError
from ..training import data
from ..training.ema import Ema
from .models import new_scheduler, new_unet, save_unet
from .options import Train


def train(args: Train) -> None:
    """Train the model of these options, or continue an interrupted run; save to ``output_dir``.

    Raises:
        InputError: options or data do not fit.
    """
    images = data.load(args, "all")
    accelerator = training.new_accelerator(args)
    channels, height, width = images.images.shape[1:]
    if height != width:
        raise InputError(f"the images are {width}x{height}, not square; give --resolution")
    null, scheduler = len(images.classes), new_scheduler()
    model = new_unet(args.model, height, channels, null)
    batches = data.Batches(
        images.images,
        images.labels,
        args.train_batch_size,
        seed=args.seed,
        flip=args.random_flip,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        device=accelerator.device,
    )

    def loss(prepared: nn.Module, i: int) -> Tensor:
        x, labels = batches[i]
        dropped = torch.rand(len(labels)) < args.cond_dropout
        labels = torch.where(dropped.to(labels.device), null, labels)
        return denoising_loss(prepared, x, labels, scheduler, reduction=args.reduction)

    def finish(ema: Ema | None) -> None:
        info = {
            "classes": list(images.classes),
            "null_class": null,
            "shape": [channels, height, width],
            "source": images.source,
            "images": len(images.labels),
            "skipped_images": len(images.skipped),
            "steps": args.max_train_steps,
            "hash": model_hash(model),
        }
        save_unet(args.output_dir, model, scheduler, info, card(args, info), ema and ema.model)
        print(f"saved unet{' and unet_ema' if ema else ''} in {args.output_dir}")

    accelerator.print(f"{images.source}: {len(images.labels)} images of {null} classes")
    training.fit(
        args,
        accelerator,
        "train",
        model,
        torch.optim.Adam(model.parameters(), args.learning_rate),
        loss,
        finish,
        same=images.made_of(),
        ema_decay=args.ema_decay if args.use_ema else None,
        parts=("unet", "unet_ema"),
    )


def card(args: Train, info: dict) -> str:
    ema = f"; `unet_ema` is their average (decay {args.ema_decay})" if args.use_ema else ""
    return f"""---
library_name: diffusers
tags: [diffusion, class-conditional]
---

# Class-conditional diffusion model of {info["source"]}

`UNet2DModel.from_pretrained(folder, subfolder="unet")`: the trained weights{ema}. Conditions
0..{info["null_class"] - 1} are the classes of `classes.json`, {info["null_class"]} is the null
class of classifier-free guidance. DDPMPipeline runs no conditional model;
`ebu_optim.diffusion.sample` does.

Trained on {info["images"]} images of {"x".join(map(str, info["shape"]))} by
`examples/ddpm/train.py`: {args.max_train_steps} steps, batch {args.train_batch_size} a process,
Adam {args.learning_rate}, conditions dropped with probability {args.cond_dropout},
seed {args.seed}.
"""
