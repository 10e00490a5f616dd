"""The world's transformer for flow matching, like Stable Diffusion 3."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (  # type: ignore[attr-defined]
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .text import WIDTH

JOINT = 2 * WIDTH  # width of a token: the concatenated embeddings of both text encoders


class Flow(nn.Module):
    """All networks as one module, from latents (n, 4, 8, 8), timesteps (n,) and token ids
    (n, LENGTH) to a velocity (n, 4, 8, 8).

    Both CLIP text encoders of SD3 are this world's text encoder. T5 is random and reads no word. It
    exists so that a prompt has one more token instead of 256 zeros.
    """

    denoiser = "transformer"

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(reads_nothing()),
                d_model=JOINT,
                d_kv=8,
                d_ff=8,
                num_layers=1,
                num_heads=1,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
        self.t5.requires_grad_(False)
        self.transformer = SD3Transformer2DModel(  # 3.5 M
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=JOINT,
            caption_projection_dim=128,
            pooled_projection_dim=JOINT,
            pos_embed_max_size=4,
        )

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            read = self.text_encoder(ids, output_hidden_states=True)
            end = self.t5(torch.ones(1, 1, dtype=torch.long, device=ids.device))[0]
        words = torch.cat([read.hidden_states[-2]] * 2, -1)  # as in the pipeline
        return self.transformer(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=torch.cat([words, end.expand(len(ids), -1, -1)], 1),
            pooled_projections=torch.cat([read.pooler_output] * 2, -1),
        ).sample

    @staticmethod
    def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
        """SD3's schedule and distribution of timesteps, without its shift, which is for large
        images."""
        found = FlowMatchEulerDiscreteScheduler(shift=1.0)
        found.register_to_config(weighting_scheme="logit_normal")
        return found

    def pipeline(self, vae: AutoencoderKL, tokenizer: Any) -> StableDiffusion3Pipeline:
        vae.register_to_config(shift_factor=0.0)
        clip = projected(self.text_encoder)
        return StableDiffusion3Pipeline(
            self.transformer,
            FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae,
            clip,
            tokenizer,
            clip,
            tokenizer,
            self.t5,
            reads_nothing(),
        )


def projected(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same encoder with an identity as projection, which SD3's pipeline needs."""
    config = CLIPTextConfig(**{**text_encoder.config.to_dict(), "projection_dim": WIDTH})
    found = CLIPTextModelWithProjection(config).requires_grad_(False)
    state = {n: t for n, t in text_encoder.state_dict().items() if "position_ids" not in n}
    if not any(n.startswith("text_model.") for n in state):  # as transformers 5 names them
        state = {f"text_model.{n}": t for n, t in state.items()}
    found.load_state_dict({**state, "text_projection.weight": torch.eye(WIDTH)})
    return found.eval()


def reads_nothing() -> T5TokenizerFast:
    """A T5 tokenizer that knows no word and returns one token, the end token."""
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    with tempfile.TemporaryDirectory() as folder:
        T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(folder)
        return T5TokenizerFast.from_pretrained(folder, model_max_length=1)
