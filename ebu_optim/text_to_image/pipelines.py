"""Find a Stable Diffusion pipeline, on disk or on the hub, and see whether it can be unlearned.

`look` reads configurations and the tokenizer alone, a few megabytes; `fetch` gets the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from diffusers import DDPMScheduler, StableDiffusionPipeline

from ..diffusion.schedules import prediction_type
from ..errors import InputError
from ..manifest import contents, key, plain
from ..modules import whole_model
from ..training.options import option

#: What an SD 1.x or 2.x pipeline is made of, and the configuration of each part.
PARTS = {
    "unet": ("UNet2DConditionModel", "config.json"),
    "vae": ("AutoencoderKL", "config.json"),
    "text_encoder": ("CLIPTextModel", "config.json"),
    "tokenizer": ("CLIPTokenizer", "tokenizer_config.json"),
    "scheduler": (None, "scheduler_config.json"),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which pipeline."""

    group: ClassVar[str] = "model"

    pretrained_model_name_or_path: str = option(help="hub id or folder: SD 1.x or 2.x")
    revision: str | None = option(None, help="of the hub: branch, tag or commit")
    variant: str | None = option(None, help="of the files, e.g. fp16")
    resolution: int | None = option(None, help="default: the model's own")


class Looked(NamedTuple):
    """Attributes:
    folder: with the configurations; `fetch` gives the one with the weights.
    unet, vae: their configurations.
    latents: (C, H, W) at --resolution.
    scheduler: the noise schedule, as a DDPMScheduler.
    """

    folder: Path
    unet: dict[str, Any]
    vae: dict[str, Any]
    resolution: int
    latents: tuple[int, int, int]
    scheduler: Any
    tokenizer: Any


def look(model: Model) -> Looked:
    """Raises:
    InputError: no network, gated, not found; no Stable Diffusion pipeline; parts missing.
    """
    name = model.pretrained_model_name_or_path
    folder = Path(name)
    local = folder.is_dir()
    if folder.is_file():
        raise InputError(
            f"{name} is a file: StableDiffusionPipeline.from_single_file(...).save_pretrained("
            "folder) makes the folder that this script reads"
        )
    if not local:
        import huggingface_hub

        patterns = ["model_index.json", "README.md", "*/*.json", "*/*.txt"]
        folder = Path(
            _hub(
                model, huggingface_hub.snapshot_download, revision=model.revision,
                allow_patterns=patterns,
            )
        )  # fmt: skip
    index = _json(folder / "model_index.json", f"{name} is no diffusion pipeline")
    _check_index(name, index)
    configs = {}
    for part, (_, file) in PARTS.items():
        if not (folder / part).is_dir():
            raise InputError(f"{name}: the subfolder {part} is missing")
        if part != "tokenizer":
            configs[part] = _json(folder / part / file, f"{name}: {part} is incomplete")
    if local:
        for part in ("unet", "vae", "text_encoder"):
            weights(folder, part, model.variant)
        _check_rest(name, folder, index)
    _check_configs(name, configs)
    unet, vae = configs["unet"], configs["vae"]
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    size = model.resolution or unet.get("sample_size", 64) * factor
    step = factor * 2 ** (len(unet.get("block_out_channels", [0] * 4)) - 1)
    if size < 1 or size % step:
        raise InputError(f"--resolution must be a multiple of {step} for this model; got {size}")
    return Looked(
        folder, unet, vae, size, (unet.get("in_channels", 4), size // factor, size // factor),
        DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
        _tokenizer(name, folder, configs["text_encoder"]),
    )  # fmt: skip


def fetch(model: Model) -> Path:
    """The folder with the weights, downloaded where it is not here yet."""
    if Path(model.pretrained_model_name_or_path).is_dir():
        return Path(model.pretrained_model_name_or_path)
    return Path(
        _hub(
            model, StableDiffusionPipeline.download, revision=model.revision, variant=model.variant,
            use_safetensors=True,
        )
    )  # fmt: skip


def weights(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors files of a part, of the variant or of none."""
    found = sorted((folder / part).glob("*.safetensors"))
    ours = [f for f in found if (f".{variant}." in f"{f.name}.") == bool(variant)]
    ours = ours if variant else [f for f in found if ".fp16." not in f.name]
    if not ours:
        there = ", ".join(p.name for p in sorted((folder / part).iterdir()))
        raise InputError(
            f"{folder / part} holds no weights as safetensors"
            f"{f' of --variant {variant}' if variant else ''}; it holds {there}"
        )
    return ours


def parts(folder: Path, variant: str | None) -> dict[str, str]:
    """Part of the pipeline -> a hash of its weights or files, and of its configuration."""
    found = {}
    for part, (_, file) in PARTS.items():
        if part == "tokenizer":
            found[part] = tokenizer_hash(folder)
            continue
        config = plain(_json(folder / part / file, f"{folder}: {part} is incomplete"))
        of_weights = "" if part == "scheduler" else contents(weights(folder, part, variant))
        found[part] = key(config, of_weights)
    return found


def tokenizer_hash(folder: Path) -> str:
    """Of the contents of the tokenizer's files: merges decide as much as the vocabulary."""
    return contents(p for p in (folder / "tokenizer").iterdir() if p.is_file())


def load(kind: Any, folder: Path, variant: str | None) -> Any:
    """A part of the pipeline in float32 and eval mode, on the CPU.

    Raises:
        InputError: the file lacks tensors of the model, or holds others.
    """
    return whole_model(kind, folder, variant=variant, use_safetensors=True).float().eval()


def _hub(model: Model, get: Any, **options: Any) -> str:
    """What `get` downloads, its dozen kinds of errors told apart for the user."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = model.pretrained_model_name_or_path
    try:
        return get(name, **options)
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated: accept its licence on https://huggingface.co/{name}, then log in "
            "with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is no folder here and no model on the hub, or a private one: look at the "
            "name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no --revision {model.revision}") from error
    except Exception as error:
        raise InputError(
            f"{name} is no folder here, and cannot be had from the hub ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Without a network give a folder; a broken "
            "download is gone on with by the same command"
        ) from error


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: {path.name} is missing in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def _check_index(name: str, index: dict[str, Any]) -> None:
    found = index.get("_class_name", "no class")
    known = "this script takes pipelines of Stable Diffusion 1.x and 2.x"
    if "text_encoder_2" in index or "transformer" in index:
        raise InputError(f"{name} is a {found}; {known}, with one text encoder and a UNet")
    for part, (kind, _) in PARTS.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise InputError(f"{name} ({found}) has no {part}: {known}")
        if kind and not str(entry[1]).startswith(kind):  # CLIPTokenizerFast is one too
            raise InputError(f"{name}: its {part} is a {entry[1]}, not a {kind}: {known}")


def _check_rest(name: str, folder: Path, index: dict[str, Any]) -> None:
    """The safety checker and the like, which are read when the result is saved: late to fail."""
    for part, entry in index.items():
        if part in PARTS or not isinstance(entry, list) or entry[-1] is None:
            continue
        remedy = f'get it, or set "{part}" to [null, null] in model_index.json'
        if not (folder / part).is_dir():
            raise InputError(f"{name}: the subfolder {part} is missing: {remedy}")
        if entry[-1].endswith("SafetyChecker") and not any((folder / part).glob("*.safetensors")):
            raise InputError(f"{name}: {part} holds no weights as safetensors: {remedy}")


def _check_configs(name: str, configs: dict[str, dict[str, Any]]) -> None:
    unet, vae = configs["unet"], configs["vae"]
    channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels[0] != channels[1]:
        raise InputError(
            f"{name}: the UNet takes {channels[0]} channels and the VAE makes {channels[1]}: it is "
            "for inpainting or the like, this script is for text to image"
        )
    width = configs["text_encoder"].get("hidden_size")
    cross = unet.get("cross_attention_dim")
    if width is not None and cross != width:
        raise InputError(
            f"{name}: the UNet takes text embeddings of {cross}, its text encoder makes {width}"
        )
    out = unet.get("out_channels", 4)
    if out != channels[0]:
        raise InputError(
            f"{name}: the UNet takes {channels[0]} channels and predicts {out}: these losses need "
            "as many"
        )
    try:
        prediction_type(configs["scheduler"])
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def _tokenizer(name: str, folder: Path, text_encoder: dict[str, Any]) -> Any:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:  # the tokenizers' library raises many kinds
        raise InputError(f"{name}: its tokenizer cannot be read: {error}") from error
    size = text_encoder.get("vocab_size")
    # from a folder without its files some versions make a tokenizer of two tokens, in silence
    if size is not None and not size / 2 < len(tokenizer) <= size:
        raise InputError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the text encoder {size}: files "
            "are missing in the subfolder tokenizer, or it belongs to another model"
        )
    positions = text_encoder.get("max_position_embeddings", 77)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer
