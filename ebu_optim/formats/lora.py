"""Add LoRAs to a pipeline's weights, and write them in diffusers' or kohya's layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..files import replacing
from .header import read_header
from .looking import is_lora

PathLike = str | os.PathLike[str]
#: An adapter: part of the pipeline -> peft's names, without the adapter's name -> tensors.
Layers = Mapping[str, Mapping[str, Tensor]]

KOHYA = {"lora_A": "lora_down", "lora_B": "lora_up"}


def fuse(pipe: Any, path: PathLike, scale: float = 1.0) -> None:
    """Add a LoRA to the weights, with its own alpha.

    diffusers reads the file and names its layers. The sum is computed here, as diffusers' loaders
    silently drop the attention of text encoders in kohya's layout (0.42 with transformers 5).

    Args:
        path: a safetensors file in diffusers', peft's or kohya's layout.

    Raises:
        InputError: the file is not a LoRA, or it belongs to another model. Nothing was changed.
    """
    pairs = _pairs(pipe, Path(path))
    with torch.no_grad():
        for layer, (down, up, factor) in pairs.items():
            weight = layer.weight
            update = (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)
            weight += (scale * factor * update).to(weight.dtype)


def check(pipe: Any, path: PathLike) -> None:
    """Check that a LoRA fits a pipeline.

    Args:
        pipe: the pipeline; its weights may be on the meta device.

    Raises:
        InputError: see `fuse`.
    """
    _pairs(pipe, Path(path))


def _pairs(pipe: Any, path: Path) -> dict[Any, tuple[Tensor, Tensor, float]]:
    """Layer -> A, B and alpha / rank."""
    header = read_header(path)
    if not is_lora(header.tensors):
        raise InputError(f"{path} is not a LoRA (it begins with {sorted(header.tensors)[0]})")
    what = f"{path} is not a LoRA for this {type(pipe).__name__}"
    try:
        is_xl = hasattr(pipe, "text_encoder_2") and hasattr(pipe, "unet")
        asked = {"unet_config": pipe.unet.config} if is_xl else {}
        state, *alphas_of, metadata = pipe.lora_state_dict(
            path.parent,
            weight_name=path.name,
            local_files_only=True,
            return_lora_metadata=True,
            **asked,
        )
    except Exception as error:  # the converters raise many types
        raise InputError(f"{what}: {str(error).strip().splitlines()[0]}") from error
    # for a transformer diffusers multiplies alpha into the tensors and returns none
    said = next(iter(alphas_of), None) or {}
    alphas = {_split(name)[0]: float(alpha) for name, alpha in said.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for name, t in state.items():
        layer, kind = _split(name)
        if kind is None:
            raise InputError(
                f"{path} holds {name}: only LoRAs are supported, not LoHa, LoKr or DoRA"
            )
        found.setdefault(layer, {})[kind] = t
    pairs = {}
    for name, both in found.items():
        module = _layer(pipe, name)
        if module is None or both.keys() != {"down", "up"}:
            raise InputError(f"{what}: it has no {name}")
        down, up = both["down"], both["up"]
        shape = (up.shape[0], *down.shape[1:])
        if shape != tuple(module.weight.shape):
            raise InputError(
                f"{what}: its {name} is {list(shape)}, the model's {list(module.weight.shape)}"
            )
        rank = down.shape[0]
        alpha = alphas.get(name, _said(metadata, name, rank))
        pairs[module] = (down, up, alpha / rank)
    return pairs


def _split(name: str) -> tuple[str, str | None]:
    """The layer's name, and "down" or "up" for the half that the tensor is; None for neither.

    diffusers' converters return peft's names, diffusers' own, and its old ones with ``processor``.
    """
    name = name.replace(".processor.", ".").removesuffix(".alpha")
    halves = r"(lora_A|lora_B|lora_down|lora_up|down|up)"
    found = re.fullmatch(rf"(.+?)(?:\.lora_linear_layer|\.lora|_lora)?\.{halves}\.weight", name)
    if found is None:
        return name, None
    return found[1], "down" if found[2] in ("lora_A", "lora_down", "down") else "up"


def _layer(pipe: Any, name: str) -> Any:
    part, _, inner = name.partition(".")
    model = getattr(pipe, part, None)
    if model is None:
        return None
    if part == "unet":
        inner = re.sub(r"\.to_out$", ".to_out.0", inner)
    elif part.startswith("text_encoder"):
        inner = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", inner)
    for path in (inner, inner.removeprefix("text_model."), f"text_model.{inner}"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


def _said(metadata: Mapping[str, Any] | None, name: str, rank: int) -> float:
    """The alpha of a layer from the metadata that diffusers writes, else the rank."""
    part, _, inner = name.partition(".")
    said = {
        k.removeprefix(f"{part}."): v
        for k, v in (metadata or {}).items()
        if k.startswith(f"{part}.")
    }
    pattern = said.get("alpha_pattern") or {}
    return float(pattern.get(inner, said.get("lora_alpha", rank)))


def write_lora(
    layers: Layers,
    out: PathLike,
    alpha: float,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an adapter as one safetensors file, with the alpha of its training.

    Args:
        layers: part ("unet", "text_encoder", "text_encoder_2", "transformer") -> the result of
            ``peft.get_peft_model_state_dict``.
        alpha: alpha of every layer; a loader adds alpha / rank * B @ A to a weight.
        layout: "diffusers" for ``load_lora_weights``; "kohya" for A1111, ComfyUI and diffusers. The
            layout of a transformer is always peft's names after ``transformer.``, which ComfyUI
            and diffusers read, with alpha multiplied into B.
        metadata: further metadata of the file.

    Returns:
        The path `out`.

    Raises:
        InputError: `out` exists; a part or the layout is unknown; `layers` is not a LoRA.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists: delete it, or give another path")
    if layout not in ("diffusers", "kohya"):
        raise InputError(f'layout must be "diffusers" or "kohya"; got {layout!r}')
    _check(layers)
    held = {p: {k: t.detach().cpu().contiguous() for k, t in layers[p].items()} for p in layers}
    if layout == "diffusers" and "transformer" not in held:
        return _write_diffusers(held, out, alpha, metadata)
    from safetensors.torch import save_file

    with replacing(out) as temporary:
        save_file(kohya(held, alpha), temporary, metadata=_said_by_kohya(held, alpha, metadata))
    return out


def kohya(layers: Layers, alpha: float) -> dict[str, Tensor]:
    """The adapter by kohya's names.

    A1111 and ComfyUI also read the layers of UNets by diffusers' names. The only text encoder is
    called ``lora_te``. Its names have ``text_model``, which newer versions of transformers omit.
    """
    single = "text_encoder_2" not in layers
    starts = {
        "unet": "lora_unet",
        "text_encoder": "lora_te" if single else "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    found = {}
    for part, state in layers.items():
        ranks = {n.partition(".lora_A.")[0]: len(t) for n, t in state.items() if ".lora_A." in n}
        for name, t in state.items():
            if part == "transformer":
                layer = name.partition(".lora_B.")[0]
                found[f"{part}.{name}"] = t * (alpha / ranks[layer]) if layer != name else t
                continue
            layer, mark, _ = re.split(r"\.(lora_[AB])\.", name)
            if part != "unet":
                layer = f"text_model.{layer.removeprefix('text_model.')}"
            start = f"{starts[part]}_{layer.replace('.', '_')}"
            found[f"{start}.{KOHYA[mark]}.weight"] = t
            found[f"{start}.alpha"] = torch.tensor(float(alpha))
    return found


def _check(layers: Layers) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2", "transformer")
    if not layers or not all(layers.values()) or not set(layers) <= set(parts):
        raise InputError(f"layers must be of {', '.join(parts)}, none empty; got {list(layers)}")
    for part, state in layers.items():
        for name in state:
            other = (
                name.replace("lora_A", "lora_B")
                if "lora_A" in name
                else name.replace("lora_B", "lora_A")
            )
            if not re.search(r"\.lora_[AB]\.weight$", name) or other not in state:
                raise InputError(
                    f"layers: {part} has {name}, which is not a half of a LoRA: give the result of "
                    "peft.get_peft_model_state_dict"
                )


def _ranks(layers: Layers) -> set[int]:
    return {len(t) for state in layers.values() for n, t in state.items() if ".lora_A." in n}


def _said_by_kohya(layers: Layers, alpha: float, metadata: Any) -> dict[str, str]:
    if "transformer" in layers:
        return {"format": "pt", **dict(metadata or {})}
    said = {"ss_network_module": "networks.lora", "ss_network_alpha": str(alpha)}
    ranks = _ranks(layers)
    if len(ranks) == 1:
        said["ss_network_dim"] = str(*ranks)
    return said | dict(metadata or {})


def _write_diffusers(layers: Layers, out: Path, alpha: float, metadata: Any) -> Path:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = StableDiffusionXLPipeline if "text_encoder_2" in layers else StableDiffusionPipeline
    options: dict[str, Any] = {}
    for part, state in layers.items():
        options[f"{part}_lora_layers"] = state
        options[f"{part}_lora_adapter_metadata"] = _config(state, alpha)
    with replacing(out) as temporary:
        kind.save_lora_weights(temporary.parent, weight_name=temporary.name, **options)
        if metadata:
            _add_metadata(temporary, metadata)
    return out


def _config(state: Mapping[str, Tensor], alpha: float) -> dict[str, Any]:
    """The part of peft's configuration that diffusers saves, as plain values for JSON."""
    from peft import LoraConfig

    ranks = {n.partition(".lora_A.")[0]: len(t) for n, t in state.items() if ".lora_A." in n}
    rank = next(iter(ranks.values()))
    options: Any = {"lora_alpha": alpha}  # peft's annotation says int, but a float works
    return LoraConfig(
        r=rank,
        **options,
        target_modules=sorted(ranks),
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
    ).to_dict()


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import load_file, save_file

    kept = dict(read_header(path).metadata)
    save_file(load_file(path), path, metadata=kept | dict(metadata))
