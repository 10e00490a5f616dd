"""Style and object of a picture by UnlearnCanvas's classifiers: ViT-L/16 with a head for its 51
styles, one of which is what seed images are called, or its 20 objects."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ._weights import load_into, needed, read_weights
from .images import RGBImages
from .naming import name_of

#: In the order of the heads' outputs.
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
#: Of ViT-L/16, the published one: width, blocks, side of a patch.
LARGE = "vit 1024x24/16"
#: A head of attention is as wide in every ViT of timm's names.
HEAD = 64


class UnlearnCanvasClassifier:
    """Images -> logits of the styles or of the objects.

    Args:
        kind: "style" or "object".
        weights_file: with timm's names, under ``model_state_dict`` or by themselves. Width, blocks
            and patches are read off it, so that a smaller one of the same names serves too.
        batch_size: images that are on the device at a time.

    Attributes:
        classes: of the logits.
        network: its size, such as `LARGE`.

    Raises:
        RuntimeError: no timm.
        ValueError, FileNotFoundError: `kind` or `weights_file` that is none.
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
                f"{name_of('weights_file')}: {weights_file} holds no ViT of timm: it lacks "
                "patch_embed.proj.weight, blocks.* or head.weight, or is too narrow"
            )
        if len(head) != len(self.classes):
            raise ValueError(
                f"{name_of('weights_file')}: {weights_file} knows {len(head)} classes, not the "
                f"{len(self.classes)} of kind {kind!r}: give the other file"
            )
        width, side = len(patch), patch.shape[-1]
        self.network = f"vit {width}x{blocks}/{side}"
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
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
        """(n, classes) float32 on the CPU, of (n, 3, H, W) uint8 or float in [-1, 1]."""
        device = next(self.model.parameters()).device
        return torch.cat(
            [
                self.model(_prepared(batch).to(device)).float().cpu()
                for batch in RGBImages(images, "images").batches(self.batch_size)
            ]
        )


def _prepared(pixels: Tensor) -> Tensor:
    """As published: PIL's bilinear resize to 224x224 whatever the shape, then to [-1, 1]."""
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
