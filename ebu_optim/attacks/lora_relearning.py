"""Relearning with a LoRA from ten images, as anybody can do with a downloaded model and a few
images of the forgotten concept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from .found import Found
from .relearning import curve

if TYPE_CHECKING:
    from .attacks import Attack

IMAGES, RANK = 10, 4
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of attention, as in diffusers' own script


def lora_relearn(attack: Attack) -> Found:
    """Train a LoRA of rank 4 in the attention of a copy of the denoiser, on the first ten images
    of the target."""

    def adapters(unet: nn.Module) -> list[nn.Parameter]:
        unet.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(attack.args.seed)
            inject_adapter_in_model(
                LoraConfig(
                    r=RANK,
                    lora_alpha=RANK,
                    target_modules=list(LAYERS),
                    init_lora_weights="gaussian",
                ),
                unet,
            )
        return [p for p in unet.parameters() if p.requires_grad]

    rate = attack.args.lora_learning_rate
    found = curve(attack, "lora_relearn", attack.rows()[:IMAGES], rate, adapters)
    images = min(IMAGES, len(attack.rows()))
    return found._replace(said={**found.said, "images": images, "rank": RANK, "lr": rate})
