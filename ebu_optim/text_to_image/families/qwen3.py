"""Families that read a prompt by Qwen3, in its template of a chat: FLUX.2 klein and Z-Image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM, Qwen3Model

from ...errors import InputError
from .family import Config, Family
from .flow_matching import STEPWISE, FlowMatching, inside
from .flux import STREAM, shifted
from .unets import Choice

TOKENS = 512  # what a call of the pipelines takes by default, the template's included
LAYERS = 3  # of Qwen3, whose outputs klein is told
DEEPEST = 27


class Qwen3(FlowMatching):
    """
    Attributes:
        thinking: how the pipeline asks for the template.
    """

    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "text_encoder_2"})
    thinking: bool
    no_new_word = "Qwen3 has no room for a new word that its pipelines would load"

    def longest(self, tokenizer: Any, config: Config) -> int:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True,
            enable_thinking=self.thinking,
        )  # fmt: skip
        return TOKENS - len(tokenizer(template).input_ids) + len(tokenizer("").input_ids)

    def fits(self, name: str, takes: int, width: int, times: int = 1) -> None:
        """Raises:
        InputError: the transformer takes another width than the text encoder makes.
        """
        if takes != times * width:
            raise InputError(
                f"{name}: the transformer takes text embeddings of {takes}, its text encoder makes "
                f"{f'{times} times ' if times > 1 else ''}{width}"
            )


class Klein(Qwen3):
    name = "FLUX.2 klein"
    made = "Qwen3 and a transformer"
    pipeline = Flux2KleinPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (Flux2Transformer2DModel, "config.json"),
        "vae": (AutoencoderKLFlux2, "config.json"),
        "text_encoder": (Qwen3ForCausalLM, "config.json"),
        "tokenizer": (Qwen2Tokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    tags = ("flux2",)
    packed = 4
    thinking = False
    modules: Mapping[str, Choice] = {
        "xattn": inside(".attn.add_k_proj.", ".attn.add_v_proj."),
        "attention": inside(".attn."),
        "single": inside(".single_transformer_blocks."),
        "context": inside(".context_embedder."),
        "full": inside(""),
    }
    lora_targets: Sequence[str] = (
        *(f"attn.{n}" for n in (*STREAM, "to_q", "to_k", "to_v", "to_out.0")),
        "attn.to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    units: Sequence[str] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    usual = 4.0

    def of(self, index: Mapping[str, Any]) -> Family:
        return KleinDistilled() if index.get("is_distilled") else self

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        config, text = configs["transformer"], configs["text_encoder"]
        self.fits(name, config.get("joint_attention_dim", 0), text.get("hidden_size", 0), LAYERS)
        if (layers := text.get("num_hidden_layers", 0)) < DEEPEST:
            raise InputError(
                f"{name}: its text encoder has {layers} layers; klein is told the 9th, 18th and "
                f"{DEEPEST}th"
            )
        if config.get("guidance_embeds"):
            raise InputError(
                f"{name}: its transformer is told a guidance, as FLUX.2 dev's; {self.name} has none"
            )

    def latents(self, configs: Mapping[str, Config], size: int) -> tuple[int, int, int]:
        channels, h, w = super().latents(configs, size)
        return 4 * channels, h // 2, w // 2

    def step(self, configs: Mapping[str, Config]) -> int:
        return 2 * self.factor(configs)

    patch = 1  # of such latents

    @torch.no_grad()
    def to_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        mode = [vae.encode(x[None].to(vae.device)).latent_dist.mode() for x in pixels]
        mean, spread = _normal(vae)
        return ((Flux2KleinPipeline._patchify_latents(torch.cat(mode)) - mean) / spread).cpu()

    @torch.no_grad()
    def to_pixels(self, vae: Any, latents: Tensor) -> Tensor:
        mean, spread = _normal(vae)
        return vae.decode(Flux2KleinPipeline._unpatchify_latents(latents * spread + mean)).sample

    @torch.no_grad()
    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 8) -> dict[str, Tensor]:
        found = [
            pipe.encode_prompt(
                list(texts[i : i + batch]), device=pipe.text_encoder.device,
                max_sequence_length=TOKENS,
            )[0].float().cpu()
            for i in range(0, len(texts), batch)
        ]  # fmt: skip
        return {"encoder_hidden_states": torch.cat(found)}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["joint_attention_dim"])}

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        sigmas = torch.linspace(1.0, 1 / n, n).tolist()
        return {"sigmas": sigmas, "mu": compute_empirical_mu(tokens, n)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        text = told["encoder_hidden_states"]
        out = denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(x_t), timestep=t / 1000, guidance=None,
            encoder_hidden_states=text,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1]).to(x_t.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(x_t[:1]).to(x_t.device),
        ).sample  # fmt: skip
        return out.transpose(1, 2).reshape(x_t.shape)


class KleinDistilled(Klein):
    name = "FLUX.2 klein, distilled"

    def guides(self, config: Config) -> str:
        return ""

    def distilled(self, name: str, config: Config) -> str | None:
        return STEPWISE.format(name, "FLUX.2 klein base")


def _normal(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and spread of the patches' channels, which klein's latents are without."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


class ZImage(Qwen3):
    """Its time runs from noise to picture, and so does its velocity."""

    name = "Z-Image"
    made = "Qwen3 and a transformer"
    pipeline = ZImagePipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (ZImageTransformer2DModel, "config.json"),
        "vae": (AutoencoderKL, "config.json"),
        "text_encoder": (Qwen3Model, "config.json"),
        "tokenizer": (Qwen2Tokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    tags = ("z-image",)
    thinking = True
    modules: Mapping[str, Choice] = {
        # the text is refined and then in one stream with the picture
        "xattn": lambda name, _: name.startswith(("layers.", "context_refiner."))
        and (".attention.to_k." in name or ".attention.to_v." in name),
        "attention": inside(".attention."),
        "context": inside(".cap_embedder."),
        "full": inside(""),
    }
    lora_targets: Sequence[str] = tuple(
        f"attention.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")
    )
    units: Sequence[str] = ("ZImageTransformerBlock",)
    lacks: Mapping[str, str] = {
        **FlowMatching.lacks,
        **dict.fromkeys(
            ("--mixed_precision fp16", "--half True"),
            "its activations go beyond float16; take bfloat16 or float32",
        ),
    }
    usual = 6.0  # the pipeline's 5, which it adds to the one that the prompt has

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        width = configs["text_encoder"].get("hidden_size", 0)
        self.fits(name, configs["transformer"].get("cap_feat_dim", 0), width)

    def usual_of(self, name: str) -> float:
        return 1.0 if "turbo" in name.lower() else self.usual

    def distilled(self, name: str, config: Config) -> str | None:
        return STEPWISE.format(name, "Z-Image") if "turbo" in name.lower() else None

    @torch.no_grad()
    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        rows: list[Tensor] = []
        for i in range(0, len(texts), batch):
            rows += pipe.encode_prompt(
                list(texts[i : i + batch]), device=pipe.text_encoder.device,
                do_classifier_free_guidance=False, max_sequence_length=TOKENS,
            )[0]  # fmt: skip
        text = torch.zeros(len(rows), TOKENS, rows[0].shape[1])
        mask = torch.zeros(len(rows), TOKENS)
        for i, row in enumerate(rows):
            text[i, : len(row)], mask[i, : len(row)] = row.float().cpu(), 1
        return {"encoder_hidden_states": text, "mask": mask}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["cap_feat_dim"]), "mask": (TOKENS,)}

    def steps(self, config: Config, tokens: int, n: int) -> dict[str, Any]:
        return shifted(config, tokens, n)

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        text, mask = told["encoder_hidden_states"], told["mask"]
        # tensors without data are counted at their longest
        used = [TOKENS] * len(text) if mask.is_meta else mask.sum(1).long().tolist()
        pictures = list(x_t.unsqueeze(2).unbind())
        words = [row[:n] for row, n in zip(text, used)]
        out = denoiser(pictures, (1000 - t) / 1000, words, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def guiding(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": scale - 1}  # the pipeline's leads on from the prompt
