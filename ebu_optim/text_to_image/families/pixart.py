"""PixArt-Sigma: a transformer that predicts noise and reads T5's text by cross attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from ...diffusion.schedules import prediction_type
from ...errors import InputError
from .family import FOR_UNETS, Config, Family
from .flow_matching import inside
from .unets import Choice, layers

TOKENS = 300  # the default of the pipeline's call
#: For transformers whose blocks have cross attention, like those of a UNet.
MODULES: Mapping[str, Choice] = {
    "xattn": inside(".attn2."),
    "selfattn": inside(".attn1."),
    "attention": inside(".attn1.", ".attn2."),
    "context": inside(".caption_projection."),
    "full": inside(""),
    "esd-x": layers(lambda name: ".attn2." in name),
    "esd-x-strict": layers(lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name),
}
NO_LORA = "diffusers supports neither adapters in its transformer nor LoRAs in its pipeline"


class PixArtSigma(Family):
    name = "PixArt-Sigma"
    made = "T5 and a transformer"
    pipeline = PixArtSigmaPipeline
    parts: Mapping[str, tuple[Any, str]] = {
        "transformer": (PixArtTransformer2DModel, "config.json"),
        "vae": (AutoencoderKL, "config.json"),
        "text_encoder": (T5EncoderModel, "config.json"),
        "tokenizer": (T5Tokenizer, "tokenizer_config.json"),
        "scheduler": (None, "scheduler_config.json"),
    }
    denoiser = "transformer"
    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    foreign = frozenset({"unet", "controlnet", "text_encoder_2"})
    tags = ("pixart-sigma",)
    modules = MODULES
    no_modules = "the others select layers of a UNet"
    lora_targets = ()
    units = ("BasicTransformerBlock",)
    lacks: Mapping[str, str] = {
        **FOR_UNETS,
        **dict.fromkeys(
            ("--train_modules lora", "--save_as lora", "--save_as kohya"),
            f"{NO_LORA}; give --train_modules xattn and --save_as changed",
        ),
        "--save_as single": "diffusers cannot load it from one file; give --save_as pipeline or "
        "changed",
    }
    masks = ("mask",)
    usual = 4.5
    wide = False

    def check(self, name: str, configs: Mapping[str, Config]) -> None:
        config, latent = configs["transformer"], configs["vae"].get("latent_channels", 4)
        taken, out = config.get("in_channels", 4), config.get("out_channels", 8) or latent
        if taken != latent or out not in (latent, 2 * latent):
            raise InputError(
                f"{name}: the transformer takes {taken} channels and predicts {out}, and the VAE "
                f"makes {latent}: it must take the VAE's number, and predict that number, or twice "
                "that number with the variance"
            )
        width = configs["text_encoder"].get("d_model", 512)
        self.fits(name, config.get("caption_channels"), width)
        told = config.get("use_additional_conditions")
        if config.get("sample_size", 128) == 128 if told is None else told:
            raise InputError(
                f"{name}: its transformer takes sizes (use_additional_conditions), as "
                f"PixArt-Alpha's does; {self.name}'s does not"
            )
        try:
            prediction_type(configs["scheduler"])
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error

    def longest(self, tokenizer: Any, config: Config) -> int:
        return TOKENS

    def step(self, configs: Mapping[str, Config]) -> int:
        return self.factor(configs) * configs["transformer"].get("patch_size", 2)

    def size(self, configs: Mapping[str, Config]) -> int:
        return configs["transformer"].get("sample_size", 128) * self.factor(configs)

    def encode(self, pipe: Any, texts: Sequence[str], batch: int = 32) -> dict[str, Tensor]:
        found = []
        for i in range(0, len(texts), batch):
            told = pipe.encode_prompt(
                list(texts[i : i + batch]),
                do_classifier_free_guidance=False,
                device=pipe.text_encoder.device,
                max_sequence_length=TOKENS,
            )
            found.append([t.float().cpu() for t in told[:2]])
        text, mask = (torch.cat(parts) for parts in zip(*found))
        return {"encoder_hidden_states": text, "mask": mask}

    def shapes(self, config: Config, length: int) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (TOKENS, config["caption_channels"]), "mask": (TOKENS,)}

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        out = denoiser(
            x_t,
            encoder_hidden_states=told["encoder_hidden_states"],
            timestep=t,
            encoder_attention_mask=told["mask"],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return out[:, : x_t.shape[1]]  # without the variance

    def drawing(self, pipe: Any, size: int) -> dict[str, Any]:
        # the prompt as in training, and exactly the requested size
        return {"clean_caption": False, "use_resolution_binning": False}
