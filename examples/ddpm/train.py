"""Train the class-conditional diffusion model that later forgets.

    accelerate launch examples/ddpm/train.py --dataset_name uoft-cs/cifar10 --random_flip \\
        --use_ema --max_train_steps 800000 --output_dir outputs/cifar10
    python examples/ddpm/train.py --digits --model small --use_ema --output_dir outputs/digits

The recipe of the DDPM code base: Adam 2e-4, clipping at 1.0, batch 128, conditions dropped to the
null class with probability 0.1, antithetic timesteps, squared error summed over C, H, W.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ebu_optim import training
from ebu_optim.class_conditional.models import new_scheduler, new_unet, save_unet
from ebu_optim.diffusion import denoising_loss, model_hash
from ebu_optim.errors import InputError
from ebu_optim.modules import parameter_bytes
from ebu_optim.training import data
from ebu_optim.training.ema import Ema


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("paper", "small"), default="paper")
    parser.add_argument("--cond_dropout", type=float, default=0.1)
    parser.add_argument("--reduction", choices=("sum", "mean"), default="sum")
    parser.add_argument("--random_flip", action="store_true")
    parser.add_argument("--use_ema", action="store_true", help="save an average as unet_ema too")
    parser.add_argument("--ema_decay", type=float, default=0.9999)
    data.add_arguments(parser)
    training.add_arguments(parser, learning_rate=2e-4)
    args = parser.parse_args(argv)
    training.check(args)
    for name in ("cond_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} must be in [0, 1); got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(argv)
    images = data.load(args, "all")
    accelerator = training.new_accelerator(args)
    channels, height, width = images.images.shape[1:]
    if height != width:
        raise InputError(f"the images are {width}x{height}, not square: give --resolution")
    null, scheduler = len(images.classes), new_scheduler()
    raw = new_unet(args.model, height, channels, null)
    size = parameter_bytes(raw)
    same = {"data": images.source, "images": str(len(images.labels))}
    with training.Run(args, accelerator, "train", size=size, same=same) as run:
        optimizer = torch.optim.Adam(raw.parameters(), lr=args.learning_rate)
        schedule = training.new_schedule(args, optimizer)
        model, optimizer = accelerator.prepare(raw.train(), optimizer)
        ema = Ema(raw.parameters(), args.ema_decay, warm=False) if args.use_ema else None
        objects = {"model": raw, "optimizer": optimizer.optimizer, "schedule": schedule}
        begin = run.resume({**objects, "ema": ema} if ema else objects)
        batches = data.Batches(
            images.images, images.labels, args.train_batch_size, seed=args.seed,
            flip=args.random_flip, process=accelerator.process_index,
            processes=accelerator.num_processes, device=accelerator.device,
        )  # fmt: skip
        accelerator.print(
            f"{images.source}: {len(images.labels)} images of {null} classes; {size / 4e6:.2f} M "
            f"parameters; {accelerator.num_processes} process(es) on {accelerator.device}"
        )
        for step in run.steps(begin, "unet"):
            for micro in range(args.gradient_accumulation_steps):
                x, labels = batches[(step - 1) * args.gradient_accumulation_steps + micro]
                dropped = torch.rand(len(labels)) < args.cond_dropout
                labels = torch.where(dropped.to(labels.device), null, labels)
                with accelerator.accumulate(model):
                    loss = denoising_loss(model, x, labels, scheduler, reduction=args.reduction)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and args.max_grad_norm:
                        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            schedule.step()
            if ema:
                ema.step(raw.parameters())
            if step % args.logging_steps == 0:
                run.log(step, loss=loss.item(), lr=schedule.get_last_lr()[0])
        if accelerator.is_main_process:
            info = {
                "classes": list(images.classes), "null_class": null,
                "shape": [channels, height, width], "source": images.source,
                "images": len(images.labels),
                "skipped_images": len(images.skipped), "steps": args.max_train_steps,
                "hash": model_hash(raw),
            }  # fmt: skip
            save_unet(args.output_dir, raw, scheduler, info, card(args, info), ema and ema.model)
            print(f"saved unet{' and unet_ema' if ema else ''} in {args.output_dir}")
        accelerator.wait_for_everyone()


def card(args: argparse.Namespace, info: dict) -> str:
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


if __name__ == "__main__":
    training.exit_on_input_errors(main)
