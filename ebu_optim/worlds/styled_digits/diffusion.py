"""The world's UNet with the frozen text encoder, and its loss on latents."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from ...diffusion import denoising_loss
from .captions import CONTENTS, STYLES, TRAINED, captions, token_ids
from .text import WIDTH


class TextToImage(nn.Module):
    """Both networks as one module, from latents (n, 4, 8, 8), timesteps (n,) and token ids
    (n, LENGTH) to a prediction (n, 4, 8, 8).
    train.py freezes the text encoder, as for Stable Diffusion."""

    denoiser = "unet"

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        # 2.4 M parameters; diffusers' attention_head_dim is the number of heads here
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(48, 96),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            # with 32 groups each group would be one or two channels, and the time signal would
            # cancel
            norm_num_groups=8,
        )

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text_encoder(ids)[0]).sample

    @staticmethod
    def new_scheduler() -> DDIMScheduler:
        """The noise schedule of Stable Diffusion 1.x."""
        return DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )

    def pipeline(self, vae: AutoencoderKL, tokenizer: Any) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae,
            self.text_encoder,
            tokenizer,
            self.unet,
            self.new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class Loss:
    """L(x, c) on random latents.

    Each has a random prompt of the trained templates that asks for it, or, with probability
    `dropout`, the empty prompt.

    Args:
        latents: (n, 4, 8, 8), scaled.
        contents, styles: their numbers (n,).
        scheduler: the noise schedule with the prediction type.
    """

    def __init__(
        self,
        latents: Tensor,
        contents: Tensor,
        styles: Tensor,
        tokenizer: Any,
        *,
        batch: int,
        dropout: float,
        device: torch.device | str,
        scheduler: Any,
    ) -> None:
        self.latents, self.batch, self.dropout, self.device = latents, batch, dropout, device
        self.scheduler = scheduler
        known = captions(TRAINED)
        self.ids = token_ids([*(c.text for c in known), ""], tokenizer)
        fitting = [
            [i for i, c in enumerate(known) if c.style == style and c.content in (content, None)]
            for content in CONTENTS
            for style in STYLES
        ]
        # (contents * styles, most): rows of equal length, so that one index chooses a prompt
        self.most = torch.tensor([len(rows) for rows in fitting])
        longest = int(self.most.max())
        self.fitting = torch.tensor([rows + [0] * (longest - len(rows)) for rows in fitting])
        self.pair = contents * len(STYLES) + styles

    def __call__(self, model: nn.Module) -> Tensor:
        rows = torch.randint(len(self.latents), (self.batch,))
        pair = self.pair[rows]
        drawn = (torch.rand(self.batch) * self.most[pair]).long()
        text = self.fitting[pair, drawn]
        text = torch.where(torch.rand(self.batch) < self.dropout, len(self.ids) - 1, text)
        return denoising_loss(
            model,
            self.latents[rows].to(self.device),
            {"ids": self.ids[text].to(self.device)},
            self.scheduler,
            reduction="mean",
        )
