"""Z-Image: a transformer with one stream for text and image.

Its time and its velocity run from noise to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from .family import Config
from .flow_matching import STEPWISE, FlowMatching, inside
from .flux import shifted
from .qwen3 import TOKENS, Qwen3
from .unets import Choice


class ZImage(Qwen3):
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
        # the text is refined first, and then shares one stream with the image
        "xattn": lambda name, _: (
            name.startswith(("layers.", "context_refiner."))
            and (".attention.to_k." in name or ".attention.to_v." in name)
        ),
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
            "its activations overflow float16; use bfloat16 or float32",
        ),
    }
    masks: Sequence[str] = ("mask",)
    usual = 6.0  # the pipeline's default 5 plus 1, as its scale counts from the prompt on

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        super().check(name, configs)
        width = configs["text_encoder"].get("hidden_size", 0)
        self.fits(name, configs["transformer"].get("cap_feat_dim", 0), width)

    def usual_of(self, name: str) -> float:
        return 1.0 if "turbo" in name.lower() else self.usual

    def distilled(self, name: str, config: Config) -> str | None:
        return STEPWISE.format(name, "Z-Image") if "turbo" in name.lower() else None

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        rows: list[Tensor] = []
        for i in range(0, len(texts), batch):
            rows += pipe.encode_prompt(
                list(texts[i : i + batch]),
                device=pipe.text_encoder.device,
                do_classifier_free_guidance=False,
                max_sequence_length=TOKENS,
            )[0]
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
        # for meta tensors, the memory count assumes the longest prompt
        used = [TOKENS] * len(text) if mask.is_meta else mask.sum(1).long().tolist()
        pictures = list(x_t.unsqueeze(2).unbind())
        words = [row[:n] for row, n in zip(text, used)]
        out = denoiser(pictures, (1000 - t) / 1000, words, return_dict=False)[0]
        return -torch.stack(out).squeeze(2)

    def guiding(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}  # the pipeline's leads on from the prompt
