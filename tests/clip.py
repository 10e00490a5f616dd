"""A tiny model of open_clip with weights that a test makes, and its cosines by NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

NAME = "ebu-optim-tiny"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 64,
        "patch_size": 8,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
    },
}


def random_weights(path: Path) -> Path:
    """A file of weights; open_clip knows the model from now on."""
    config = path.with_name(f"{NAME}.json")
    config.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = open_clip.CLIP(**CONFIG).state_dict()
    state["visual.proj"] *= 10
    torch.save(state, path)
    return path


def by_hand(x: torch.Tensor, prompts: list[str], weights: Path) -> np.ndarray:
    """(n,) cosines; pictures (n, 3, H, W) uint8 are no higher than wide."""
    model = open_clip.CLIP(**CONFIG).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    found = []
    for picture, prompt in zip(x, prompts, strict=True):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        wide = 32 * image.width // image.height
        left = (wide - 32) // 2
        image = image.resize((wide, 32), Image.Resampling.BICUBIC).crop((left, 0, left + 32, 32))
        pixels = (np.asarray(image) / 255 - mean) / std
        with torch.no_grad():
            a = model.encode_image(torch.tensor(pixels.transpose(2, 0, 1)[None]).float())
            b = model.encode_text(open_clip.tokenize([prompt]))
        a, b = a[0].double().numpy(), b[0].double().numpy()
        found.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return np.array(found)
