"""Style and object of an image by UnlearnCanvas's classifiers.

These are ViT-L/16 with a head for 51 styles, one of which is that of seed images, or 20 objects.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ._weights import load_into, needed, read_weights
from .images import RGBImages
from .naming import name_of

#: In the order of the classifiers' outputs.
STYLES = (
    "Abstractionism",
    "Artist_Sketch",
    "Blossom_Season",
    "Bricks",
    "Byzantine",
    "Cartoon",
    "Cold_Warm",
    "Color_Fantasy",
    "Comic_Etch",
    "Crayon",
    "Cubism",
    "Dadaism",
    "Dapple",
    "Defoliation",
    "Early_Autumn",
    "Expressionism",
    "Fauvism",
    "French",
    "Glowing_Sunset",
    "Gorgeous_Love",
    "Greenfield",
    "Impressionism",
    "Ink_Art",
    "Joy",
    "Liquid_Dreams",
    "Magic_Cube",
    "Meta_Physics",
    "Meteor_Shower",
    "Monet",
    "Mosaic",
    "Neon_Lines",
    "On_Fire",
    "Pastel",
    "Pencil_Drawing",
    "Picasso",
    "Pop_Art",
    "Red_Blue_Ink",
    "Rust",
    "Seed_Images",
    "Sketch",
    "Sponge_Dabbed",
    "Structuralism",
    "Superstring",
    "Surrealism",
    "Ukiyoe",
    "Van_Gogh",
    "Vibrant_Flow",
    "Warm_Love",
    "Warm_Smear",
    "Watercolor",
    "Winter",
)
OBJECTS = (
    "Architectures",
    "Bears",
    "Birds",
    "Butterfly",
    "Cats",
    "Dogs",
    "Fishes",
    "Flame",
    "Flowers",
    "Frogs",
    "Horses",
    "Human",
    "Jellyfish",
    "Rabbits",
    "Sandwiches",
    "Sea",
    "Statues",
    "Towers",
    "Trees",
    "Waterfalls",
)
KINDS = {"style": STYLES, "object": OBJECTS}
#: The published ViT-L/16: width, blocks, side of a patch.
LARGE = "vit 1024x24/16"
#: The width of an attention head, the same in every ViT of timm.
HEAD = 64


class UnlearnCanvasClassifier:
    """Images -> logits of the styles or of the objects.

    Args:
        kind: "style" or "object".
        weights_file: weights under timm's names, at the top level or under ``model_state_dict``.
            Width, blocks and patches are read from it, so a smaller ViT with these names works too.
        batch_size: number of images on the device at a time.

    Attributes:
        classes: the names of the logits' classes.
        network: its size, such as `LARGE`.

    Raises:
        RuntimeError: timm is not available.
        ValueError: `kind` is unknown, or `weights_file` holds other weights.
        FileNotFoundError: `weights_file` does not exist.
    """

    def __init__(
        self,
        kind: str,
        weights_file: str | os.PathLike[str],
        *,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {tuple(KINDS)}; got {kind!r}")
        self.classes = KINDS[kind]
        state = read_weights(weights_file, "weights_file", inside="model_state_dict")
        timm = needed("timm.models.vision_transformer", "text-to-image")
        patch, head = state.get("patch_embed.proj.weight"), state.get("head.weight")
        blocks = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        if patch is None or head is None or not blocks or len(patch) < HEAD:
            raise ValueError(
                f"{name_of('weights_file')}: {weights_file} holds no ViT of timm, because it lacks "
                "patch_embed.proj.weight, blocks.* or head.weight, or is too narrow; give another "
                "file"
            )
        if len(head) != len(self.classes):
            raise ValueError(
                f"{name_of('weights_file')}: {weights_file} has {len(head)} classes, but kind "
                f"{kind!r} has {len(self.classes)}; give the other file"
            )
        width, side = len(patch), patch.shape[-1]
        self.network = f"vit {width}x{blocks}/{side}"
        with torch.random.fork_rng(devices=[]):  # the initial weights are random, then replaced
            model = timm.VisionTransformer(
                img_size=224,
                patch_size=side,
                embed_dim=width,
                depth=blocks,
                num_heads=width // HEAD,
                num_classes=len(head),
            )
        load_into(model, state, "weights_file")
        self.model, self.batch_size = model.eval().to(device), batch_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return (n, classes) float32 on the CPU for (n, 3, H, W) uint8 or float in [-1, 1]."""
        device = next(self.model.parameters()).device
        return torch.cat(
            [
                self.model(_prepared(batch).to(device)).float().cpu()
                for batch in RGBImages(images, "images").batches(self.batch_size)
            ]
        )


def _prepared(pixels: Tensor) -> Tensor:
    """Prepare as published: PIL's bilinear resize to 224x224, whatever the shape; then [-1, 1]."""
    image: Any = require("PIL.Image", "metrics")
    functional: Any = needed("torchvision.transforms.functional", "text-to-image")
    resized = [
        image.fromarray(x.permute(1, 2, 0).numpy()).resize((224, 224), image.Resampling.BILINEAR)
        for x in pixels
    ]
    return (
        torch.stack([functional.pil_to_tensor(x) for x in resized])
        .float()
        .div(255)
        .sub(0.5)
        .div(0.5)
    )
