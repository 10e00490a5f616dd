"""Write a diffusers folder as one file with LDM's names, which diffusers' converters provide.

A converter maps LDM's names to diffusers' names. It is given every name that the LDM layout could
have; the names that it maps to tensors of the model are the names to write.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import need_disk, replacing
from .architecture import Architecture, from_folder
from .header import DTYPES, NAMES, Entry, Header, read, read_header
from .looking import PREFIXES
from .names import Rows, Shape, rows, some
from .opening import PathLike
from .writing import Changed, cast, fitting, header_bytes, known, to_bytes

#: Names within a residual block: diffusers' -> LDM's.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


def write_folder(
    folder: PathLike,
    changed: Changed,
    out: PathLike,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a diffusers folder as one file in the LDM layout, which ComfyUI, A1111 and kohya use.

    The scheduler's prediction type is written into the metadata. For SDXL it is also marked by
    empty tensors (``v_pred``, ``ztsnr``), which ComfyUI looks for.

    Args:
        folder: a folder of Stable Diffusion 1.x, 2.x or SDXL with safetensors weights.
        changed: part -> diffusers' names -> values that replace those of the folder.
        dtype: the dtype of every weight; None keeps the folder's.
        variant: the variant of the folder's files, such as "fp16".
        metadata: further metadata of the file.

    Returns:
        The path `out`.

    Raises:
        InputError: the folder or its weights are missing; the LDM layout has no name for a tensor;
            `out` exists; `changed` has names or shapes that the folder lacks; the disk is full.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise InputError(f"{out} exists: delete it, or give another path")
    if dtype is not None and dtype not in NAMES:
        raise InputError(f"dtype must be one that safetensors supports; got {dtype}")
    made = Architecture(from_folder(folder), folder, "", "")
    family = family_of(made)
    sources = {part: _sources(folder, part, variant) for part in made.parts}
    if unknown := changed.keys() - sources.keys():
        raise InputError(f"changed: {folder} has no {min(unknown)}; it has {', '.join(sources)}")
    kinds, gathered, new = {}, {}, {}
    for part in made.parts:
        new[part] = fitting(changed.get(part, {}), made.shapes(part), f"the {part} of {folder}")
        for key, (shape, places) in layout(family, part, made).items():
            entry = _stored(next(iter(places)), sources[part], folder / part)[1]
            stored = NAMES[dtype] if dtype else entry.dtype
            kinds[key], gathered[key] = (stored, shape), (part, places)
    said, empty = _marks(family, made.configs["scheduler"])
    kinds |= dict.fromkeys(empty, ("F32", (0,)))
    head = header_bytes(kinds, said | dict(metadata or {}))
    size = sum(torch.Size(s).numel() * DTYPES[d].itemsize for d, s in kinds.values())
    need_disk(out.parent, size + len(head), "the checkpoint")
    with replacing(out) as temporary, temporary.open("wb") as target:
        target.write(head)
        for key, (part, places) in gathered.items():
            stored, shape = kinds[key]
            pieces = []
            for name, at in places.items():
                t = _value(name, new[part], sources[part], folder / part)
                pieces.append(t.T if at.transposed else t)
            whole = torch.cat(pieces) if pieces[1:] else pieces[0]
            whole = cast(whole.reshape(shape), DTYPES[stored], f"{folder}: {key}")
            target.write(to_bytes(whole))
    return out


def _marks(family: str, scheduler: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The metadata and the names of the empty tensors that describe the scheduler in one file."""
    is_v = scheduler.get("prediction_type", "epsilon") == "v_prediction"
    said = {"format": "pt", "modelspec.prediction_type": "v" if is_v else "epsilon"}
    if family != "sdxl" or not is_v:
        return said, []
    return said, ["v_pred", *(["ztsnr"] if scheduler.get("rescale_betas_zero_snr") else [])]


def family_of(made: Architecture) -> str:
    if "text_encoder_2" in made.configs:
        return "sdxl"
    return "sd2" if made.configs["unet"].get("use_linear_projection") else "sd1"


def layout(family: str, part: str, made: Architecture) -> dict[str, tuple[Shape, dict[str, Rows]]]:
    """LDM's name of each tensor -> its shape, and the diffusers tensors that its rows hold.

    Raises:
        InputError: a diffusers tensor has no name in LDM's layout.
    """
    shapes, config = made.shapes(part), made.configs[part]
    prefix = PREFIXES[family][part][0]
    candidates = {prefix + key: shape for key, shape in _candidates(part, prefix, shapes, config)}
    found = rows(part, candidates, config, shapes)
    if missing := sorted(shapes.keys() - found.keys()):
        raise InputError(
            f"{made.folder}: its {part} has {some(missing)}, which has no name in the layout of a "
            "single file: keep it as a diffusers folder"
        )
    grouped: dict[str, dict[str, Rows]] = defaultdict(dict)
    for name in shapes:
        grouped[found[name].key][name] = found[name]
    result = {}
    for key, places in grouped.items():
        ordered = dict(sorted(places.items(), key=lambda item: item[1].first))
        name, at = next(iter(ordered.items()))
        inner = shapes[name][::-1] if at.transposed else shapes[name]
        total = sum(shapes[n][0] for n in ordered) if len(ordered) > 1 else inner[0]
        # LDM's attention of a VAE is a convolution
        pointwise = part == "vae" and ".attn_1." in key and len(inner) == 2
        result[key] = ((total, *inner[1:], *((1, 1) if pointwise else ())), ordered)
    return result


def _sources(folder: Path, part: str, variant: str | None) -> dict[str, Header]:
    """diffusers' name of each tensor of a part -> the header of the file with the tensor."""
    files = sorted((folder / part).glob("*.safetensors"))
    if variant:
        files = [file for file in files if f".{variant}." in file.name]
    else:
        files = [file for file in files if not re.search(r"\.(fp16|bf16)\b", file.name)]
    if not files:
        of = f" of the variant {variant}" if variant else ""
        raise InputError(f"{folder / part} has no safetensors weights{of}")
    headers = [read_header(file) for file in files]
    return {name: header for header in headers for name in header.tensors}


def _stored(name: str, source: Mapping[str, Header], place: Path) -> tuple[Header, Entry]:
    found = known(name, source)
    if found is None:
        raise InputError(f"{place} lacks {name}: get the files again")
    return source[found], source[found].tensors[found]


def _value(
    name: str, changed: Mapping[str, Tensor], source: Mapping[str, Header], place: Path
) -> Tensor:
    if name in changed:
        return changed[name].detach().cpu()
    header, entry = _stored(name, source, place)
    with header.path.open("rb") as file:
        return read(file, entry)


def _candidates(
    part: str, prefix: str, shapes: Mapping[str, Shape], config: Mapping[str, Any]
) -> Iterator[tuple[str, Shape]]:
    """Names that the layout could have, and shapes with the rows that the converters need."""
    if part == "unet":
        return _of_unet(shapes, config)
    if part == "vae":
        return _of_vae(shapes)
    names = [n.removeprefix("text_model.") for n in shapes]
    if prefix.endswith(".transformer."):
        return ((f"text_model.{n}", (1,)) for n in names)
    return _of_openclip(names, config["hidden_size"])


def _of_unet(shapes: Iterable[str], config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    for names in DIFFUSERS_TO_LDM_MAPPING["unet"].values():
        yield from ((key, (1,)) for key in names.values())
    layers = [n.split(".", 4) for n in shapes if re.match(r"(down|up)_blocks\.\d+\.[ra]", n)]
    inner = {(kind, rest) for _, _, kind, _, rest in layers}
    blocks = len(config["down_block_types"]) * (config["layers_per_block"] + 1)
    with_attention = {tuple(layer[:4]) for layer in layers if layer[2] == "attentions"}
    for i in range(blocks + 1):
        for start in (f"input_blocks.{i}", f"output_blocks.{i}"):
            for kind, rest in inner:
                resnet = kind == "resnets"
                yield (
                    f"{start}.{0 if resnet else 1}.{_replaced(rest, RESNET if resnet else {})}",
                    (1,),
                )
        up, layer = divmod(i, config["layers_per_block"] + 1)
        place = 2 if ("up_blocks", str(up), "attentions", str(layer)) in with_attention else 1
        for end in ("weight", "bias"):
            yield f"input_blocks.{i}.0.op.{end}", (1,)
            yield f"output_blocks.{i}.{place}.conv.{end}", (1,)
    for name in shapes:
        if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            kind, number, rest = found.groups()
            resnet = kind == "resnets"
            place = 2 * int(number) + (0 if resnet else 1)
            yield f"middle_block.{place}.{_replaced(rest, RESNET if resnet else {})}", (1,)


def _of_vae(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

    yield from ((key, (1,)) for key in DIFFUSERS_TO_LDM_MAPPING["vae"].values())
    count = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("decoder.up_blocks."))
    for name in shapes:
        side, _, rest = name.partition(".")
        if found := re.match(r"(?:down|up)_blocks\.\d+\.resnets\.(\d+)\.(.*)", rest):
            inner = found[2].replace("conv_shortcut", "nin_shortcut")
            for i in range(count):
                way = "down" if side == "encoder" else "up"
                yield f"{side}.{way}.{i}.block.{found[1]}.{inner}", (1,)
        elif found := re.match(r"mid_block\.resnets\.(\d)\.(.*)", rest):
            yield f"{side}.mid.block_{int(found[1]) + 1}.{found[2]}", (1,)
        elif found := re.match(r"mid_block\.attentions\.0\.(.*)", rest):
            yield f"{side}.mid.attn_1.{_replaced(found[1], ATTENTION)}", (1,)
    for i in range(count):
        for end in ("weight", "bias"):
            yield f"encoder.down.{i}.downsample.conv.{end}", (1,)
            yield f"decoder.up.{i}.upsample.conv.{end}", (1,)


def _of_openclip(names: Iterable[str], width: int) -> Iterator[tuple[str, Shape]]:
    for name in names:
        if found := re.match(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            inner = (3 * width, 1) if found[2] == "weight" else (3 * width,)
            yield f"transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}", inner
        elif name == "text_projection.weight":
            yield "text_projection", (width, 1)
        else:
            yield _replaced(name, OPENCLIP), (1,)


def _replaced(name: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        name = name.replace(old, new)
    return name
