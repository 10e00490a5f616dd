"""Qwen-Image: a transformer with separate streams for image and text.

It takes the last layer of Qwen2.5-VL, and latents packed by four."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ...errors import InputError
from .family import Config
from .flow_matching import TARGETS, FlowMatching, inside
from .flux import shifted
from .unets import Choice

TOKENS = 512  # the default of the pipeline's call
#: Settings of the transformers of its variants.
OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImage(FlowMatching):
    name = "Qwen-Image"
    made = "Qwen2.5-VL and a transformer"
    pipeline = QwenImagePipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (QwenImageTransformer2DModel, "config.json"),
        "vae": (AutoencoderKLQwenImage, "config.json"),
        "text_encoder": (Qwen2_5_VLForConditionalGeneration, "config.json"),
        "tokenizer": (Qwen2Tokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "processor"})
    tags = ("qwen-image",)
    modules: Mapping[str, Choice] = {
        # the image's reading of the text
        "xattn": inside(".attn.add_k_proj.", ".attn.add_v_proj."),
        "attention": inside(".attn."),
        "context": inside(".txt_in."),
        "full": inside(""),
    }
    lora_targets: Sequence[str] = TARGETS
    units: Sequence[str] = ("QwenImageTransformerBlock",)
    lacks: Mapping[str, str] = {
        **FlowMatching.lacks,
        **dict.fromkeys(
            ("--mixed_precision fp16", "--half True"),
            "its activations overflow float16; use bfloat16 or float32",
        ),
    }
    masks: Sequence[str] = ("mask",)
    packed = 4
    framed = True
    usual = 4.0

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        vae, config = configs["vae"], configs["transformer"]
        out = config.get("patch_size", 2) ** 2 * (config.get("out_channels") or 16)
        unpacked = {
            "vae": {**vae, "latent_channels": vae.get("z_dim", 16)},
            "transformer": {**config, "out_channels": out},
        }
        super().check(name, {**configs, **unpacked})
        if found := [n for n in OTHERS if config.get(n)]:
            raise InputError(
                f"{name}: its transformer has {found[0]}, as variants of {self.name} with inputs "
                "other than text do"
            )
        text = configs["text_encoder"].get("text_config") or configs["text_encoder"]
        self.fits(name, config.get("joint_attention_dim", 3584), text.get("hidden_size", 0))

    def unread(self, config: Config) -> tuple[str, ...]:
        last = f"transformer_blocks.{config['num_layers'] - 1}"
        return f"{last}.attn.to_add_out", f"{last}.txt_mlp"

    def factor(self, configs: Mapping[str, Config]) -> int:
        return 2 ** len(configs["vae"].get("temperal_downsample", [0] * 3))

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        side = size // self.factor(configs)
        return configs["vae"].get("z_dim", 16), side, side

    def longest(self, tokenizer: Any, config: Config) -> int:
        pipe = QwenImagePipeline(*[None] * 5)  # only for its prompt template
        begun = pipe.prompt_template_encode_start_idx
        template = tokenizer(pipe.prompt_template_encode.format("")).input_ids
        return TOKENS + begun - len(template)

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        films = pixels.unsqueeze(2)
        modes = [vae.encode(x[None].to(vae.device)).latent_dist.mode().cpu() for x in films]
        mean, spread = _normal(vae)
        return (torch.cat(modes).squeeze(2) - mean) / spread

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        mean, spread = (t.to(latents) for t in _normal(vae))
        return vae.decode((latents * spread + mean).unsqueeze(2)).sample.squeeze(2)

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 8) -> dict[str, Tensor]:
        rows = [
            pipe.encode_prompt(t, device=pipe.text_encoder.device, max_sequence_length=TOKENS)[0][0]
            .float()
            .cpu()
            for t in texts
        ]
        text = torch.zeros(len(rows), TOKENS, rows[0].shape[1])
        mask = torch.zeros(len(rows), TOKENS)
        for i, row in enumerate(rows):
            text[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"encoder_hidden_states": text, "mask": mask}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        wide = config.get("joint_attention_dim", 3584)
        return {"encoder_hidden_states": (TOKENS, wide), "mask": (TOKENS,)}

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        return shifted(config, tokens, n)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        (n, _, h, w), mask = x_t.shape, told["mask"]
        # for meta tensors, the memory count assumes the longest prompt
        used = TOKENS if mask.is_meta else int(mask.sum(1).max())
        out = denoiser(
            hidden_states=_packed(x_t),
            timestep=t / 1000,
            img_shapes=[[(1, h // 2, w // 2)]] * n,
            encoder_hidden_states=told["encoder_hidden_states"][:, :used],
            encoder_hidden_states_mask=mask[:, :used],
        ).sample
        return _unpacked(out, h, w)

    def guide(self, null: Tensor, text: Tensor, scale: float) -> Tensor:
        # rescaled in each pack to the norm of the prediction with the prompt
        found, said = _packed(super().guide(null, text, scale)), _packed(text)
        length = said.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True)
        return _unpacked(found * length, *null.shape[2:])

    def guiding(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": ""}


def _packed(x: Tensor) -> Tensor:
    return QwenImagePipeline._pack_latents(x, *x.shape)


def _unpacked(x: Tensor, h: int, w: int) -> Tensor:
    return QwenImagePipeline._unpack_latents(x, h, w, 1).squeeze(2)


def _normal(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels."""
    of = vae.config.latents_mean, vae.config.latents_std
    mean, spread = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in of)
    return mean, spread
