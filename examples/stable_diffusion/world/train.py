"""Train the world's Stable Diffusion pipeline from nothing: its autoencoder, then its text encoder
and UNet together on the latents.

    python examples/stable_diffusion/world/train.py --output_dir outputs/world

`outputs/world/pipeline` is what StableDiffusionPipeline.from_pretrained and ../unlearn.py take:
2.9 M parameters, 32x32 pictures. --resume_from_checkpoint latest goes on after a kill, bit for bit
on a CPU.

The defaults cost about 38 minutes of one busy CPU core by profiles of single steps (0.22 s for one
of the autoencoder, 0.31 s for one of the rest). They have not been run to their end. After 700
steps at a constant learning rate, on an autoencoder of 300, the style was the asked one in 36 of
36 pictures and the digit in 4, which is chance: whether 6000 steps teach the digits is not known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parents[1] / "ddpm"), str(HERE.parents[1])]

import autoencoder  # noqa: E402
import diffusion  # noqa: E402
import loop  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
from captions import HELD_OUT, TRAINED, tokenizer  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from ema import Ema, averaged  # noqa: E402
from images import World, world  # noqa: E402
from sources import InputError  # noqa: E402
from torch import nn  # noqa: E402

from ebu_optim._files import replacing_folder  # noqa: E402
from ebu_optim.diffusion import model_hash  # noqa: E402


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--autoencoder_steps", type=int, default=2000)
    add("--autoencoder_learning_rate", type=float, default=2e-3)
    add("--caption_dropout", type=float, default=0.1, help="share of empty prompts")
    add("--ema_decay", type=float, default=0.999, help="of text encoder and UNet; it is saved")
    loop.add_arguments(
        parser, train_batch_size=64, max_train_steps=6000, learning_rate=1e-3,
        lr_scheduler="cosine", lr_warmup_steps=100,
    )  # fmt: skip
    args = parser.parse_args(argv)
    loop.check(args)
    for name in ("caption_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name} must be in [0, 1); got {getattr(args, name)}")
    if args.autoencoder_steps < 1:
        raise InputError(f"--autoencoder_steps must be >= 1; got {args.autoencoder_steps}")
    if not args.autoencoder_learning_rate > 0:
        raise InputError(
            f"--autoencoder_learning_rate must be > 0; got {args.autoencoder_learning_rate}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run with these options; None: those of the command line."""
    args = parse(argv)
    accelerator = loop.new_accelerator(args)
    train, words = world("train", args.max_train_samples), tokenizer()
    vae, model = autoencoder.new_autoencoder(), diffusion.TextToImage(words)
    accelerator.print(
        f"{len(train.pictures)} pictures; autoencoder {millions(vae):.2f} M parameters, text "
        f"encoder {millions(model.text_encoder):.2f} M, UNet {millions(model.unet):.2f} M, "
        f"{len(words)} tokens; on {accelerator.device}"
    )
    loss = autoencoder.Loss(train.pictures, args.train_batch_size, accelerator.device)
    first = loop.of_stage(
        args, "autoencoder", max_train_steps=args.autoencoder_steps,
        learning_rate=args.autoencoder_learning_rate,
    )  # fmt: skip
    loop.fit(
        first, accelerator, "autoencoder", vae, loss, lambda _: None,
        parts=("../diffusion", "../pipeline"),  # they belong to the old autoencoder
    )  # fmt: skip
    latents = autoencoder.normalise(vae, train.pictures)
    error = reconstruction(vae, world("test", args.max_train_samples))
    accelerator.print(f"reconstructed test pictures: root mean square error {error:.3f}")

    loss = diffusion.Loss(
        latents, train.contents, train.styles, words, batch=args.train_batch_size,
        dropout=args.caption_dropout, device=accelerator.device,
    )  # fmt: skip

    def finish(ema: Ema | None) -> None:
        with averaged(model, ema), replacing_folder(args.output_dir / "pipeline") as work:
            diffusion.pipeline(vae.cpu(), model.cpu(), words).save_pretrained(work)
            (work / "README.md").write_text(card(args))
            (work / "world.json").write_text(json.dumps(facts(args, vae, model, error), indent=1))
        print(f"saved {args.output_dir / 'pipeline'}")

    loop.fit(
        loop.of_stage(args, "diffusion"), accelerator, "diffusion", model, loss, finish,
        ema_decay=args.ema_decay, same={"autoencoder": model_hash(vae)}, parts=("../pipeline",),
    )  # fmt: skip


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def reconstruction(vae: AutoencoderKL, test: World) -> float:
    """Root mean square error of pictures in [-1, 1] that were encoded and decoded."""
    found = autoencoder.decode(vae, autoencoder.encode(vae, test.pictures))
    return (found - test.pictures).square().mean().sqrt().item()


def facts(
    args: argparse.Namespace, vae: AutoencoderKL, model: diffusion.TextToImage, error: float
) -> dict:
    """world.json."""
    return {
        "templates": TRAINED, "held_out_templates": HELD_OUT, "reconstruction_error": error,
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("vae", vae), ("text_encoder", model.text_encoder),
                               ("unet", model.unet))
        },
        "versions": {"torch": torch.__version__},
        "options": {k: str(v) for k, v in vars(args).items()},
    }  # fmt: skip


def card(args: argparse.Namespace) -> str:
    return f"""---
library_name: diffusers
tags: [text-to-image, stable-diffusion]
---

# Digits in styles: a Stable Diffusion pipeline to measure unlearning in

`StableDiffusionPipeline.from_pretrained(folder)("a red picture of the digit 7",
num_inference_steps=20, guidance_scale=3)`: 32x32 pixels. It knows the words and templates of
`examples/stable_diffusion/world/captions.py` and nothing else.

Trained on scikit-learn's digits by `examples/stable_diffusion/world/train.py`: autoencoder
{args.autoencoder_steps} steps, text encoder and UNet {args.max_train_steps} steps of
{args.train_batch_size} pictures, seed {args.seed}; their average (decay {args.ema_decay}) is here.
What it draws has not been measured yet: `measure.py` does.
"""


if __name__ == "__main__":
    training.exit_on_input_errors(main)
