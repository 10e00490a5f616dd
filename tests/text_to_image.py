"""A small Stable Diffusion pipeline with random weights: 60 thousand parameters, 16x16 images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "a an image of cat dog car red blue person photo painting the in style".split()  # noqa: SIM905
LENGTH = 12  # tokens that a prompt may have, begin and end included


def tokenizer(folder: Path, length: int = LENGTH) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{c}</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
            parts = ["".join(pair), *parts[2:]]
    tokens = list(dict.fromkeys([*tokens, *map("".join, merges)]))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
    # by position: transformers 4 and 5 call them otherwise
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length
    )


#: The text encoder of SD 1.x.
LARGE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}


def read(words: Any, kind: str = "CLIPTextModel", **more: Any) -> Any:
    """A text encoder of transformers' class `kind`."""
    import transformers

    config = transformers.CLIPTextConfig(
        **{
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "projection_dim": 8,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
            **more,
        }
    )
    return getattr(transformers, kind)(config)


def autoencoder(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **{"latent_channels": 4, **more},
    )


def denoiser(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            **more,
        }
    )


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipeline(
    folder: Path,
    prediction_type: str = "epsilon",
    seed: int = 0,
    inpainting: bool = False,
    full: bool = False,
) -> Path:
    """SD 1.x with "epsilon", SD 2.x (linear projections) with "v_prediction"; saved in `folder`.
    `full` has the size of SD 1.x."""
    import diffusers

    torch.manual_seed(seed)
    more: dict[str, Any] = {"use_linear_projection": prediction_type == "v_prediction"}
    more |= {"in_channels": 9} if inpainting else {}
    if full:
        words = tokenizer(folder.with_name(f"{folder.name}_words"), 77)
        text_encoder = read(words, **LARGE)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
        )
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **more)
    else:
        words = tokenizer(folder.with_name(f"{folder.name}_words"))
        text_encoder, vae, unet = read(words), autoencoder(), denoiser(**more)
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    kind = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
    getattr(diffusers, kind)(
        vae,
        text_encoder,
        words,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path, inpainting: bool = False, seed: int = 0) -> Path:
    """SDXL base in small, saved in `folder`."""
    import diffusers

    torch.manual_seed(seed)
    words = tokenizer(folder.with_name(f"{folder.name}_words"))
    other = tokenizer(folder.with_name(f"{folder.name}_words_2"))
    other.pad_token = "z"  # noqa: S105 - as SDXL's second pads with a word
    encoders = read(words), read(words, "CLIPTextModelWithProjection")
    unet = denoiser(
        cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
        **{"in_channels": 9} if inpainting else {},
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **SCHEDULE, timestep_spacing="leading", steps_offset=1
    )
    kind = "StableDiffusionXLInpaintPipeline" if inpainting else "StableDiffusionXLPipeline"
    getattr(diffusers, kind)(
        autoencoder(), *encoders, words, other, unet, scheduler
    ).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Any:
    """A tokenizer of letters, as T5's in kind."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scores += [(c, -3.0 - i / 100) for i, c in enumerate(letters)]
    T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def sd3(folder: Path, with_t5: bool = True, seed: int = 0, **more: Any) -> Path:
    """SD3 in small, saved in `folder`: 83 thousand parameters in the transformer."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = [tokenizer(folder.with_name(f"{folder.name}_words{n}")) for n in ("", "_2")]
    clips = [read(w, "CLIPTextModelWithProjection", projection_dim=32) for w in words]
    third, letters = None, None
    if with_t5:
        letters = t5(folder.with_name(f"{folder.name}_letters"))
        letters.model_max_length = 512  # as of the released ones
        third = T5EncoderModel(
            T5Config(
                vocab_size=len(letters),
                d_model=64,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ).eval()
    transformer = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 16,
            "pos_embed_max_size": 24,
            **more,
        }
    )
    vae = autoencoder(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        clips[0],
        words[0],
        clips[1],
        words[1],
        third,
        letters,
    ).save_pretrained(folder)
    return folder


def flux(folder: Path, dev: bool = True, seed: int = 0, **more: Any) -> Path:
    """FLUX.1 in small, saved in `folder`: dev is told a guidance and shifts by the picture's size,
    schnell does neither."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words, letters = (
        kind(folder.with_name(f"{folder.name}_{kind.__name__}")) for kind in (tokenizer, t5)
    )
    second = T5EncoderModel(
        T5Config(
            vocab_size=len(letters),
            d_model=32,
            d_kv=8,
            d_ff=37,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    transformer = diffusers.FluxTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "guidance_embeds": dev,
            **more,
        }
    )
    schedule = {"use_dynamic_shifting": True, "shift": 3.0} if dev else {"shift": 1.0}
    diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(**schedule),
        autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        read(words),
        words,
        second,
        letters,
        transformer,
    ).save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen3(folder: Path, kind: str, layers: int) -> tuple[Any, Any]:
    """A text encoder of transformers' class `kind`, and a tokenizer of bytes."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {name: i for i, name in enumerate([*special, *sorted(ByteLevel.alphabet())])}
    words = transformers.Qwen2Tokenizer(
        vocab=vocab, merges=[], extra_special_tokens=special[1:], pad_token=special[0]
    )
    words.chat_template = CHAT
    words.save_pretrained(folder)
    config = transformers.Qwen3Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    found = transformers.Qwen2Tokenizer.from_pretrained(folder)
    return getattr(transformers, kind)(config).eval(), found


def klein(folder: Path, distilled: bool = False, seed: int = 0, **more: Any) -> Path:
    """FLUX.2 klein in small, saved in `folder`; its text encoder is as deep as klein's."""
    import diffusers

    torch.manual_seed(seed)
    encoder, words = qwen3(folder.with_name(f"{folder.name}_words"), "Qwen3ForCausalLM", 27)
    transformer = diffusers.Flux2Transformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": (4, 4, 4, 4),
            "timestep_guidance_channels": 32,
            "guidance_embeds": False,
            **more,
        }
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    g = torch.Generator().manual_seed(seed)
    vae.bn.running_mean.copy_(torch.randn(16, generator=g) / 4)
    vae.bn.running_var.copy_(torch.rand(16, generator=g) + 0.5)
    diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae,
        encoder,
        words,
        transformer,
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def z_image(folder: Path, seed: int = 0, **more: Any) -> Path:
    """Z-Image in small, saved in `folder`."""
    import diffusers

    torch.manual_seed(seed)
    encoder, words = qwen3(folder.with_name(f"{folder.name}_words"), "Qwen3Model", 2)
    transformer = diffusers.ZImageTransformer2DModel(
        **{
            "in_channels": 4,
            "dim": 32,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [1024, 32, 32],
            **more,
        }
    )
    for name in ("x_pad_token", "cap_pad_token"):
        getattr(transformer, name).data.normal_(std=0.02)
    diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        encoder,
        words,
        transformer,
    ).save_pretrained(folder)
    return folder


def few(images: int) -> list:
    """Options of unlearn.py with which its sets take a moment."""
    sets = ("--replay_images", "--surrogate_images", "--forget_images")
    steps = ["--num_inference_steps", 2, "--guided_steps", 3]
    return [x for name in sets for x in (name, images)] + [*steps, "--learning_rate", 1e-3]
