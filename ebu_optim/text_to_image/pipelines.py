"""Find a text-to-image pipeline, on disk or on the hub, and see whether it can be unlearned.

`look` reads configurations and the tokenizer alone, a few megabytes; `fetch` gets the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from diffusers import DiffusionPipeline

from ..errors import InputError
from ..formats import unpacked
from ..manifest import contents, key, plain
from ..modules import whole_model
from ..training.fields import option
from .families import STABLE_DIFFUSION, Family, of_folder, of_index


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which pipeline."""

    group: ClassVar[str] = "model"

    pretrained_model_name_or_path: str = option(
        help="The model: a hub id, a diffusers folder or a .safetensors file of Stable "
        "Diffusion 1.x, 2.x, XL, their inpainting models, SD3, FLUX.1, FLUX.2 klein, "
        "Z-Image, Qwen-Image, PixArt-Sigma or Sana."
    )
    revision: str | None = option(None, help="Branch, tag or commit on the hub.")
    variant: str | None = option(None, help="Variant of the files, e.g. fp16.")
    resolution: int | None = option(
        None, help="Height and width of the pictures in pixels. Default: the model's own."
    )
    architecture: Path | None = option(
        None,
        help="For a model in one file: a diffusers folder of the same model, for sizes that no "
        "release has, or for a transformer (SD3, FLUX, Sana, ...), whose file lacks the rest.",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, help="For a model in one file: what it predicts. Default: what is found in it."
    )
    vae: Path | None = option(None, help="For a model in one file: the file of another VAE.")
    lora: Path | None = option(
        None, help="For a model in one file: a LoRA that is added to its weights."
    )

    def check_file(self) -> None:
        """Raises:
        InputError: options of a single file for what is none.
        """
        if Path(self.pretrained_model_name_or_path).is_file():
            return
        for name in ("architecture", "prediction_type", "vae", "lora"):
            if (value := getattr(self, name)) is not None:
                raise InputError(
                    f"--{name} {value} is for a model in one file; "
                    f"{self.pretrained_model_name_or_path} is none"
                )


class Looked(NamedTuple):
    """Attributes:
    folder: with the configurations; `fetch` gives the one with the weights.
    unet, vae: configurations of the denoiser and of the VAE.
    latents: (C, H, W) at --resolution.
    scheduler: the noise schedule, as the losses take it.
    tokenizer: by which prompts are measured: the first text encoder's, or `Family.reads`.
    family: the adapter.
    configs: all parts' configurations.
    tokenizers: all of them, by part.
    """

    folder: Path
    unet: dict[str, Any]
    vae: dict[str, Any]
    resolution: int
    latents: tuple[int, int, int]
    scheduler: Any
    tokenizer: Any
    family: Family = STABLE_DIFFUSION
    configs: Mapping[str, Any] = {}
    tokenizers: Mapping[str, Any] = {}


def look(model: Model, weights: bool = True) -> Looked:
    """Args:
        weights: False looks at configurations alone: of a file at its header, of a folder not for
            weights.

    Raises:
        InputError: no network, gated, not found; no pipeline of a family that is known; parts
            missing.
    """
    name = model.pretrained_model_name_or_path
    model.check_file()
    folder = Path(name)
    local = folder.is_dir()
    if folder.is_file():
        folder = of_file(model, weights)
    elif not local:
        import huggingface_hub

        patterns = ["model_index.json", "README.md", "*/*.json", "*/*.txt"]
        folder = Path(
            _hub(
                model,
                huggingface_hub.snapshot_download,
                revision=model.revision,
                allow_patterns=patterns,
            )
        )
    index = _json(folder / "model_index.json", f"{name} is no diffusion pipeline")
    family = of_index(name, index)
    configs = {}
    for part, (_, file) in family.parts.items():
        if not (folder / part).is_dir():
            raise InputError(f"{name}: the subfolder {part} is missing")
        if part not in family.tokenizers():
            configs[part] = _json(folder / part / file, f"{name}: {part} is incomplete")
    if local and weights:
        for part in family.weighty():
            weights_of(folder, part, model.variant)
        _check_rest(name, folder, index, family)
    family.check(name, configs)
    size, step = model.resolution or family.size(configs), family.step(configs)
    if size < 1 or size % step:
        raise InputError(f"--resolution must be a multiple of {step} for this model; got {size}")
    tokenizers = {
        tokenizer: _tokenizer(name, folder, family, tokenizer, configs[encoder])
        for encoder, tokenizer in family.encoders.items()
    }
    family.check_tokenizers(name, tokenizers)
    denoiser, latents = configs[family.denoiser], family.latents(configs, size)
    tokenizer = tokenizers[family.reads or next(iter(tokenizers))]
    tokenizer.model_max_length = family.longest(tokenizer, denoiser)
    return Looked(
        folder,
        denoiser,
        configs["vae"],
        size,
        latents,
        family.schedule(folder, latents),
        tokenizer,
        family,
        configs,
        tokenizers,
    )


def fetch(model: Model) -> Path:
    """The folder with the weights, downloaded or unpacked where it is not here yet."""
    if Path(model.pretrained_model_name_or_path).is_file():
        return of_file(model)
    if Path(model.pretrained_model_name_or_path).is_dir():
        return Path(model.pretrained_model_name_or_path)
    return Path(
        _hub(
            model,
            DiffusionPipeline.download,
            revision=model.revision,
            variant=model.variant,
            use_safetensors=True,
        )
    )


def of_file(model: Model, weights: bool = True) -> Path:
    """The folder of a model in one file, in the cache."""
    return unpacked(
        model.pretrained_model_name_or_path,
        config=model.architecture,
        vae=model.vae,
        prediction_type=model.prediction_type,
        lora=model.lora,
        weights=weights,
    )


def weights_of(folder: Path, part: str, variant: str | None) -> list[Path]:
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
    family, found = of_folder(folder), {}
    for part, (_, file) in family.parts.items():
        if part in family.tokenizers():
            found[part] = tokenizer_hash(folder, part)
            continue
        config = plain(_json(folder / part / file, f"{folder}: {part} is incomplete"))
        of_weights = contents(weights_of(folder, part, variant)) if part in family.weighty() else ""
        found[part] = key(config, of_weights)
    if family.settings:
        index = _json(folder / "model_index.json", f"{folder} is no diffusion pipeline")
        found["settings"] = key({name: index.get(name) for name in family.settings})
    return found


def tokenizer_hash(folder: Path, part: str = "tokenizer") -> str:
    """Of the contents of the tokenizer's files: merges decide as much as the vocabulary."""
    return contents(p for p in (folder / part).iterdir() if p.is_file())


def load(kind: Any, folder: Path, variant: str | None) -> Any:
    """A part of the pipeline in float32 and eval mode, on the CPU.

    Raises:
        InputError: the file lacks tensors of the model, or holds others.
    """
    return whole_model(kind, folder, variant=variant, use_safetensors=True).float().eval()


def assembled(folder: Path, variant: str | None, **options: Any) -> Any:
    """The pipeline of a folder, its parts with weights in float32 on the CPU; each is read by
    itself, as the pipeline would fill in what a file lacks, with noise.

    Args:
        options: of the pipeline's ``from_pretrained``.

    Raises:
        InputError: see `load`.
    """
    family = of_folder(folder)
    parts_of = {part: load(family.kind(part), folder / part, variant) for part in family.weighty()}
    return family.pipeline.from_pretrained(
        folder,
        variant=variant,
        use_safetensors=True,
        **dict.fromkeys(family.absent),
        **options,
        **parts_of,
    )


def _hub(model: Model, get: Any, **options: Any) -> str:
    """What `get` downloads. Each kind of its errors becomes an InputError with a remedy."""
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
            f"{name} is neither a folder here nor a public model on the hub: check the name, or "
            "log in with `hf auth login` if the model is private"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no --revision {model.revision}") from error
    except Exception as error:
        raise InputError(
            f"{name} is no folder here, and the hub did not deliver it ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Without a network give a folder; the same "
            "command continues a download that broke off"
        ) from error


def _json(path: Path, what: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: {path.name} is missing in {path.parent}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def _check_rest(name: str, folder: Path, index: dict[str, Any], family: Family) -> None:
    """The safety checker and the like, which are read when the result is saved: late to fail."""
    for part, entry in index.items():
        if part in family.parts or not isinstance(entry, list) or entry[-1] is None:
            continue
        remedy = f'get it, or set "{part}" to [null, null] in model_index.json'
        if not (folder / part).is_dir():
            raise InputError(f"{name}: the subfolder {part} is missing: {remedy}")
        if entry[-1].endswith("SafetyChecker") and not any((folder / part).glob("*.safetensors")):
            raise InputError(f"{name}: {part} holds no weights as safetensors: {remedy}")


def _tokenizer(
    name: str, folder: Path, family: Family, part: str, text_encoder: Mapping[str, Any]
) -> Any:
    try:
        tokenizer = family.kind(part).from_pretrained(folder / part)
    except Exception as error:  # the tokenizers' library raises many kinds
        raise InputError(f"{name}: its {part} cannot be read: {error}") from error
    size = text_encoder.get("vocab_size")
    # from a folder without its files some versions make a tokenizer of two tokens, in silence
    if size is not None and not size / 2 < len(tokenizer) <= size:
        raise InputError(
            f"{name}: the {part} has {len(tokenizer)} tokens and the text encoder {size}: files "
            f"are missing in the subfolder {part}, or it belongs to another model"
        )
    # T5 has no table of positions, and CLIP's configuration may leave its 77 out
    table = None if text_encoder.get("model_type") == "t5" else 77
    if positions := text_encoder.get("max_position_embeddings", table):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer
