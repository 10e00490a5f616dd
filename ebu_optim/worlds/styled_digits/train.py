"""Train the world's Stable Diffusion pipeline from scratch: its autoencoder, its text encoder, and
its UNet on the latents.

    python examples/stable_diffusion/world/train.py --output_dir outputs/world

StableDiffusionPipeline.from_pretrained and ../unlearn.py can load `outputs/world/pipeline`. It has
2.9 M parameters and generates 32x32 images. --resume_from_checkpoint latest continues an
interrupted run, bit for bit on a CPU.

The training takes about 20 minutes on one CPU core: 4 for the autoencoder, half a minute for the
text encoder, 15 for the UNet. With --denoiser transformer a small transformer learns flow matching
instead of the UNet, and the result is a StableDiffusion3Pipeline with 3.5 M parameters, at 0.4 s
per step. `measure.py` measures the result; docs/stable_diffusion.md has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ... import training
from ...diffusion import model_hash
from ...errors import InputError
from ...files import replacing_folder
from ...training.ema import Ema, averaged
from ...training.fields import as_dict, at_least, option
from . import autoencoder, diffusion, flow, loop, text
from .captions import CONTENTS, HELD_OUT, STYLES, TRAINED, captions, concept, tokenizer
from .images import World, world
from .loop import LoopOptions

Denoiser = diffusion.TextToImage | flow.Flow


@dataclass(frozen=True, kw_only=True)
class WorldOptions(LoopOptions):
    """The options of the pipeline's training. Those of every training apply to the denoiser."""

    denoiser: Literal["unet", "transformer"] = option(
        "unet",
        help="unet: noise prediction, as Stable Diffusion 1.x; transformer: flow matching, "
        "as Stable Diffusion 3.",
    )
    max_train_steps: int = option(3000, help="Steps of training of the denoiser.")
    lr_warmup_steps: int = option(
        100, help="Steps at the start over which its learning rate rises."
    )
    autoencoder_steps: int = option(1000, help="Steps of training of the autoencoder.")
    autoencoder_learning_rate: float = option(2e-3, help="Learning rate of the autoencoder.")
    text_encoder_steps: int = option(1000, help="Steps of training of the text encoder.")
    text_encoder_learning_rate: float = option(1e-3, help="Learning rate of the text encoder.")
    without: list[str] = option(
        [],
        metavar="WORD",
        help="Words of concepts of which the denoiser sees no image. Such a world is the "
        "reference for unlearning.",
    )
    caption_dropout: float = option(0.1, help='Share of prompts to replace by "", for guidance.')
    ema_decay: float = option(
        0.999, help="Decay of the EMA of the denoiser's weights. The EMA is saved."
    )

    @property
    def concepts(self) -> list[str]:
        """The names of the concepts that are left out."""
        return sorted({concept(word) for word in self.without})

    def resolved(self) -> WorldOptions:
        """A copy with the names of the concepts in `without`, so that all their words give the same
        run."""
        return replace(self, without=self.concepts)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.concepts
        except ValueError as error:
            raise InputError(f"--without: {error}") from error
        for name in ("caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name} must be in [0, 1); got {getattr(self, name)}")
        at_least(self, 1, "autoencoder_steps", "text_encoder_steps")
        for stage in ("autoencoder", "text_encoder"):
            rate = getattr(self, f"{stage}_learning_rate")
            if not rate > 0:
                raise InputError(f"--{stage}_learning_rate must be > 0; got {rate}")


def train(config: WorldOptions) -> None:
    """Train the pipeline, or resume its training, and save it in ``config.output_dir``."""
    args = config.resolved()
    accelerator = loop.new_accelerator(args)
    train, words = world("train", args.max_train_samples), tokenizer()
    vae, reader = autoencoder.new_autoencoder(), text.Reader(words)
    kind = flow.Flow if args.denoiser == "transformer" else diffusion.TextToImage
    model = kind(reader.text_encoder)
    parts = {
        "autoencoder": vae,
        "text encoder": reader.text_encoder,
        model.denoiser: getattr(model, model.denoiser),
    }
    sizes = ", ".join(f"{name} {millions(part):.2f} M" for name, part in parts.items())
    accelerator.print(
        f"{len(train.pictures)} images; parameters: {sizes}; {len(words)} tokens; on "
        f"{accelerator.device}"
    )

    seen = shown(train, args.without)
    if not seen.any():
        raise InputError(f"--without {' '.join(args.without)} leaves no image: give fewer words")

    def stage(name: str, part: nn.Module, loss: Callable[[nn.Module], Tensor], *later: str) -> None:
        """Train one model.

        Args:
            later: folders that depend on an earlier version of the model and are removed with it.
        """
        options = {"max_train_steps": f"{name}_steps", "learning_rate": f"{name}_learning_rate"}
        # concepts are left out only of the denoiser, as if CLIP still knew the word
        own = args.stage(name, without=[], **{k: getattr(args, v) for k, v in options.items()})
        loop.fit(own, accelerator, name, part, loss, lambda _: None, parts=later)

    batch, device = args.train_batch_size, accelerator.device
    later = ("../diffusion", "../pipeline")
    stage(
        "autoencoder",
        vae,
        autoencoder.Loss(train.pictures, batch, device),
        "../text_encoder",
        *later,
    )
    latents = autoencoder.normalise(vae, train.pictures)
    error = reconstruction(vae, world("test", args.max_train_samples))
    accelerator.print(f"reconstructed test images: root mean square error {error:.3f}")

    stage("text_encoder", reader, text.Loss(words, batch, device), *later)
    reader.text_encoder.requires_grad_(False)
    told = {
        n: text.understood(reader, captions(t), words)
        for n, t in (("trained", TRAINED), ("held out", HELD_OUT))
    }
    accelerator.print(f"captions understood: {json.dumps(told)}")

    loss = diffusion.Loss(
        latents[seen],
        train.contents[seen],
        train.styles[seen],
        words,
        batch=batch,
        dropout=args.caption_dropout,
        device=device,
        scheduler=model.new_scheduler(),
    )

    def finish(ema: Ema | None) -> None:
        with averaged(model, ema), replacing_folder(args.output_dir / "pipeline") as work:
            model.cpu().pipeline(vae.cpu(), words).save_pretrained(work)
            (work / "README.md").write_text(card(args))
            made = facts(args, vae, model, {"reconstruction_error": error, "understood": told})
            (work / "world.json").write_text(json.dumps(made, indent=1))
        print(f"saved {args.output_dir / 'pipeline'}")

    loop.fit(
        args.stage("diffusion"),
        accelerator,
        "diffusion",
        model,
        loss,
        finish,
        ema_decay=args.ema_decay,
        parts=("../pipeline",),
        same={"autoencoder": model_hash(vae), "text_encoder": model_hash(model.text_encoder)},
    )


def shown(train: World, without: Sequence[str]) -> Tensor:
    """Whether each image shows none of these concepts, (n,) bool."""
    gone = [
        numbers == list(known).index(name)
        for numbers, known in ((train.contents, CONTENTS), (train.styles, STYLES))
        for name in without
        if name in known
    ]
    return ~torch.stack(gone).any(0) if gone else torch.ones(len(train.contents), dtype=torch.bool)


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def reconstruction(vae: AutoencoderKL, test: World) -> float:
    """The root mean square error of images in [-1, 1] after encoding and decoding."""
    found = autoencoder.decode(vae, autoencoder.encode(vae, test.pictures))
    return (found - test.pictures).square().mean().sqrt().item()


def facts(
    args: WorldOptions,
    vae: AutoencoderKL,
    model: Denoiser,
    found: dict[str, Any],
) -> dict[str, Any]:
    """The content of world.json."""
    return {
        "templates": TRAINED,
        "held_out_templates": HELD_OUT,
        **found,
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (
                ("vae", vae),
                ("text_encoder", model.text_encoder),
                (model.denoiser, getattr(model, model.denoiser)),
            )
        },
        "versions": {"torch": torch.__version__},
        "options": {k: str(v) for k, v in as_dict(args).items()},
    }


def card(args: WorldOptions) -> str:
    name, tag, pipe = {
        "unet": ("UNet", "stable-diffusion", "StableDiffusionPipeline"),
        "transformer": ("transformer", "stable-diffusion-3", "StableDiffusion3Pipeline"),
    }[args.denoiser]
    gone = ", ".join(args.without)
    unseen = f"\nThe {name} was shown no image of: {gone}." if gone else ""
    return f"""---
library_name: diffusers
tags: [text-to-image, {tag}]
---

# Digits in styles: a Stable Diffusion pipeline to measure unlearning in

`{pipe}.from_pretrained(folder)("a red picture of the digit 7",
num_inference_steps=20, guidance_scale=3)`: 32x32 pixels. It knows the words and templates of
`examples/stable_diffusion/world/captions.py` and nothing else.

Trained on scikit-learn's digits by `examples/stable_diffusion/world/train.py`: autoencoder
{args.autoencoder_steps} steps, text encoder {args.text_encoder_steps}, {name}
{args.max_train_steps} steps of {args.train_batch_size} images, seed {args.seed}; its average
(decay {args.ema_decay}) is here.{unseen} What it generates is measured by `measure.py`.
"""


if __name__ == "__main__":
    training.command(train, WorldOptions, __doc__)
