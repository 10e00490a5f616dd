"""Find a text-to-image pipeline, on disk or on the hub, and check whether it is supported.

`look` reads only configurations and tokenizers, a few megabytes; `fetch` gets the weights.
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
    """The options that name a pipeline."""

    group: ClassVar[str] = "model"

    pretrained_model_name_or_path: str = option(
        help="The model: a hub id, a diffusers folder or a .safetensors file of Stable "
        "Diffusion 1.x, 2.x, XL, their inpainting models, SD3, FLUX.1, FLUX.2 klein, "
        "Z-Image, Qwen-Image, PixArt-Sigma or Sana."
    )
    revision: str | None = option(None, help="Branch, tag or commit on the hub.")
    variant: str | None = option(None, help="Variant of the files, e.g. fp16.")
    resolution: int | None = option(
        None, help="Height and width of the images in pixels. Default: the model's native size."
    )
    architecture: Path | None = option(
        None,
        help="For a model in one file: a diffusers folder of the same architecture. It is needed "
        "for sizes that no release has, and for a transformer (SD3, FLUX, Sana, ...), whose file "
        "lacks the other parts.",
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        None, help="For a model in one file: what it predicts. Default: detected from the file."
    )
    vae: Path | None = option(None, help="For a model in one file: the file of another VAE.")
    lora: Path | None = option(None, help="For a model in one file: a LoRA to add to its weights.")

    def check_file(self) -> None:
        """Check that options for a model in one file are given only for one.

        Raises:
            InputError: such an option is given for a folder or a hub id.
        """
        if Path(self.pretrained_model_name_or_path).is_file():
            return
        for name in ("architecture", "prediction_type", "vae", "lora"):
            if (value := getattr(self, name)) is not None:
                raise InputError(
                    f"--{name} {value} is for a model in one file; "
                    f"{self.pretrained_model_name_or_path} is not a file"
                )


class Looked(NamedTuple):
    """What `look` finds.

    Attributes:
        folder: the folder with the configurations; `fetch` returns the one with the weights.
        unet, vae: configurations of the denoiser and of the VAE.
        resolution: height and width of the images in pixels.
        latents: (C, H, W) of the latents at this resolution.
        scheduler: the noise schedule that the losses use.
        tokenizer: the one that limits the length of prompts: that of the first text encoder, or
            `Family.reads`.
        family: the adapter of the pipeline's family.
        configs: the configurations of all parts.
        tokenizers: all tokenizers, by part.
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
    """Read a pipeline's configurations and tokenizers, and check that it is supported.

    Args:
        weights: False reads no weights: of a file only the header, and in a folder weights may be
            missing.

    Raises:
        InputError: the model cannot be reached, is gated or does not exist; it is not a pipeline
            of a supported family; parts are missing.
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
    what = f"{name} is not a diffusers pipeline"
    index = _json(folder / "model_index.json", what, _result(folder))
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
    """The folder with the weights, which is downloaded or unpacked first if necessary."""
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
    """The folder in the cache into which a model in one file is unpacked."""
    return unpacked(
        model.pretrained_model_name_or_path,
        config=model.architecture,
        vae=model.vae,
        prediction_type=model.prediction_type,
        lora=model.lora,
        weights=weights,
    )


def weights_of(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The safetensors files of a part, of the variant if one is given.

    Raises:
        InputError: there are none.
    """
    found = sorted((folder / part).glob("*.safetensors"))
    ours = [f for f in found if (f".{variant}." in f"{f.name}.") == bool(variant)]
    ours = ours if variant else [f for f in found if ".fp16." not in f.name]
    if not ours:
        there = ", ".join(p.name for p in sorted((folder / part).iterdir()))
        raise InputError(
            f"{folder / part} has no safetensors weights"
            f"{f' of --variant {variant}' if variant else ''}; it has {there}"
        )
    return ours


def parts(folder: Path, variant: str | None) -> dict[str, str]:
    """Part of the pipeline -> a hash of its configuration and its weights or files."""
    family, found = of_folder(folder), {}
    for part, (_, file) in family.parts.items():
        if part in family.tokenizers():
            found[part] = tokenizer_hash(folder, part)
            continue
        config = plain(_json(folder / part / file, f"{folder}: {part} is incomplete"))
        of_weights = contents(weights_of(folder, part, variant)) if part in family.weighty() else ""
        found[part] = key(config, of_weights)
    if family.settings:
        index = _json(folder / "model_index.json", f"{folder} is not a diffusers pipeline")
        found["settings"] = key({name: index.get(name) for name in family.settings})
    return found


def tokenizer_hash(folder: Path, part: str = "tokenizer") -> str:
    """A hash of the contents of all files of a tokenizer, as merges matter too."""
    return contents(p for p in (folder / part).iterdir() if p.is_file())


def load(kind: Any, folder: Path, variant: str | None) -> Any:
    """A part of the pipeline in float32 and eval mode, on the CPU.

    Raises:
        InputError: the file lacks tensors of the model, or has others.
    """
    return whole_model(kind, folder, variant=variant, use_safetensors=True).float().eval()


def assembled(folder: Path, variant: str | None, **options: Any) -> Any:
    """The pipeline of a folder, with all weights in float32 on the CPU.

    Each part is loaded separately, as diffusers would fill missing tensors with noise.

    Args:
        options: arguments of the pipeline's ``from_pretrained``.

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
    """What `get` downloads. Each type of its errors becomes an InputError with a remedy."""
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
            f"{name} is not a local folder, and the download from the hub failed "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Without a network "
            "give a folder; the same command continues an interrupted download"
        ) from error


def _result(folder: Path) -> str:
    """What to give instead of a folder of `ebu forget`, as the end of an error message."""
    one_file = "*.safetensors" if folder.name == "single" else "single/*.safetensors"
    found = sorted(folder.glob(one_file))
    found += [folder / kind for kind in ("pipeline", "changed", "lora") if (folder / kind).is_dir()]
    return f": give {found[0]}, which is in it" if found else ""


def _json(path: Path, what: str, remedy: str = "") -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: {path.name} is missing in {path.parent}{remedy}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{what}: {path} cannot be read ({error})") from error


def _check_rest(name: str, folder: Path, index: dict[str, Any], family: Family) -> None:
    """Check parts such as the safety checker now, as they are loaded only to save the result."""
    for part, entry in index.items():
        if part in family.parts or not isinstance(entry, list) or entry[-1] is None:
            continue
        remedy = f'get it, or set "{part}" to [null, null] in model_index.json'
        if not (folder / part).is_dir():
            raise InputError(f"{name}: the subfolder {part} is missing: {remedy}")
        if entry[-1].endswith("SafetyChecker") and not any((folder / part).glob("*.safetensors")):
            raise InputError(f"{name}: {part} has no safetensors weights: {remedy}")


def _tokenizer(
    name: str, folder: Path, family: Family, part: str, text_encoder: Mapping[str, Any]
) -> Any:
    try:
        tokenizer = family.kind(part).from_pretrained(folder / part)
    except Exception as error:  # the tokenizers' library raises many types
        raise InputError(f"{name}: its {part} cannot be read: {error}") from error
    size = text_encoder.get("vocab_size")
    # from a folder without its files some versions silently create a tokenizer of two tokens
    if size is not None and not size / 2 < len(tokenizer) <= size:
        raise InputError(
            f"{name}: the {part} has {len(tokenizer)} tokens and the text encoder {size}: files "
            f"are missing in the subfolder {part}, or it belongs to another model"
        )
    # T5 has no position table, and CLIP's configuration may omit its 77
    table = None if text_encoder.get("model_type") == "t5" else 77
    if positions := text_encoder.get("max_position_embeddings", table):
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer
