"""The supported families of text-to-image pipelines, one adapter per file.

`of_index` finds the adapter of a pipeline; docs/families.md says how to add one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InputError
from .conditions import Conditions, join, split
from .family import Family
from .flux import Flux
from .inpainting import Inpainting, SDXLInpainting
from .pixart import PixArtSigma
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import StableDiffusion

__all__ = ["FAMILIES", "Conditions", "Family", "join", "named", "of_folder", "of_index", "split"]

STABLE_DIFFUSION = StableDiffusion()
#: Name of the pipeline's class -> its adapter.
FAMILIES: dict[str, Family] = {
    family.pipeline.__name__: family
    for family in (
        STABLE_DIFFUSION,
        Inpainting(),
        SDXL(),
        SDXLInpainting(),
        SD3(),
        Flux(),
        PixArtSigma(),
    )
}
#: Pipelines that older versions of diffusers and transformers lack -> their file and adapter.
NEWER = {
    "Flux2KleinPipeline": ("klein", "Klein"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "SanaPipeline": ("sana", "Sana"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
}
for _pipeline, (_file, _adapter) in NEWER.items():
    with suppress(ImportError):
        FAMILIES[_pipeline] = getattr(import_module(f".{_file}", __name__), _adapter)()
#: Start of the class name of a pipeline without an adapter -> a description of it.
OTHERS = {
    "StableDiffusionXLImg2Img": "Stable Diffusion XL's refiner, or its image to image",
    "StableDiffusionXL": "a variant of Stable Diffusion XL for more than text to image",
    "StableDiffusion3": "a variant of Stable Diffusion 3 for more than text to image",
    "StableDiffusionUpscale": "an upscaler",
    "StableDiffusionLatentUpscale": "an upscaler",
    "StableDiffusionImg2Img": "Stable Diffusion for image to image",
    "StableDiffusion": "a variant of Stable Diffusion for more than text to image",
    "LatentConsistency": "a latent consistency model",
    "Flux2": "FLUX.2 dev, or a variant for more than text to image",
    "Flux": "a variant of FLUX.1 for more than text to image",
    "ZImage": "a variant of Z-Image for more than text to image",
    "QwenImage": "a variant of Qwen-Image for more than text to image",
    "PixArt": "PixArt-Alpha",
    "Sana": "Sana Sprint, or a variant",
    "Kandinsky": "Kandinsky",
    "IF": "DeepFloyd IF",
    "Wuerstchen": "Wuerstchen",
    "StableCascade": "Stable Cascade",
    "AuraFlow": "AuraFlow",
    "HunyuanDiT": "HunyuanDiT",
}


def named(pipeline: str) -> Family:
    """The adapter for the name of a pipeline's class.

    Raises:
        InputError: there is none.
    """
    if pipeline not in FAMILIES:
        raise InputError(f"no adapter for a {pipeline}; {known()}")
    return FAMILIES[pipeline]


def known() -> str:
    said = (f"{family.name} ({pipeline})" for pipeline, family in FAMILIES.items())
    return f"supported are {', '.join(said)}"


def of_folder(folder: Path) -> Family:
    """The adapter of a pipeline's folder, which `pipelines.look` has checked."""
    index = json.loads((folder / "model_index.json").read_text())
    return named(index["_class_name"]).of(index)


def of_index(name: str, index: Mapping[str, Any]) -> Family:
    """The adapter of the pipeline `name` with this content of model_index.json.

    Raises:
        InputError: the family is not supported; parts are missing, or have another class.
    """
    found = str(index.get("_class_name", "no class"))
    family = FAMILIES.get(found)
    if family is None and found in NEWER:
        raise InputError(
            f"{name} is a {found}, which the installed diffusers or transformers lacks: pip "
            "install -U diffusers transformers"
        )
    if family is None:
        like = next((what for begin, what in OTHERS.items() if found.startswith(begin)), None)
        raise InputError(f"{name} is a {found}{f', {like}' if like else ''}; {known()}")
    family = family.of(index)
    if foreign := sorted(p for p in family.foreign if (index.get(p) or [None])[-1] is not None):
        raise InputError(
            f"{name} is a {found} and has a {foreign[0]}: {family.name} is a pipeline with "
            f"{family.made}"
        )
    for part, (kind, _) in family.parts.items():
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            raise InputError(f"{name} ({found}) has no {part}: {family.name} needs it")
        if kind and entry[1] not in (kind.__name__, f"{kind.__name__}Fast"):
            raise InputError(
                f"{name}: its {part} is a {entry[1]}, not a {kind.__name__}: {known()}"
            )
    return family
