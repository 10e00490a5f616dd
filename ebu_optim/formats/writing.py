"""Write a single file again with other values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from ..files import need_disk, replacing
from .header import DTYPES, Entry, read
from .looking import EMA
from .names import Rows
from .opening import PathLike, Single

CHUNK = 2**24
#: Part of the pipeline -> diffusers' names -> new values.
Changed = Mapping[str, Mapping[str, Tensor]]

#: Metadata with hashes of the file's bytes, which are wrong once the bytes change.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def write_single(
    source: PathLike | Single,
    changed: Changed,
    out: PathLike,
    *,
    config: PathLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a copy of the file `source` with the tensors of `changed`.

    Layout, names and dtypes are those of the source. All other tensors are copied byte for byte,
    and so is the metadata, except for hashes. ``model_ema.*`` is left out, as it still has the
    concept. One tensor is in memory at a time.

    Args:
        changed: part ("unet", "vae", "text_encoder", "text_encoder_2", "transformer") ->
            diffusers' names -> new values.
        config: the folder that the file was opened with, if there was one.
        metadata: further metadata of the file.

    Returns:
        The path `out`.

    Raises:
        InputError: see `Single`; `out` exists; `changed` has names or shapes that the file lacks,
            NaN, Inf or values beyond the file's dtype; the disk is full.
    """
    single = source if isinstance(source, Single) else Single(source, config=config)
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists: delete it, or give another path")
    header = single.checkpoint.header
    edits = _edits(single, changed)
    kept = sorted(
        (k for k in header.tensors if not k.startswith(EMA)), key=lambda k: header.tensors[k].first
    )
    said = {k: v for k, v in header.metadata.items() if k not in HASHES} | dict(metadata or {})
    shapes = {k: (header.tensors[k].dtype, header.tensors[k].shape) for k in kept}
    head = header_bytes(shapes, said)
    size = sum(e.last - e.first for e in (header.tensors[k] for k in kept))
    need_disk(out.parent, size + len(head), "the checkpoint")
    with replacing(out) as temporary, temporary.open("wb") as target, header.path.open("rb") as old:
        target.write(head)
        for key in kept:
            entry = header.tensors[key]
            if key in edits:
                target.write(to_bytes(_edited(key, entry, old, edits[key], header.path)))
            else:
                _copy(old, entry, target)
    return out


def header_bytes(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The header for tensors that follow each other in this order.

    Args:
        shapes: name -> safetensors' dtype and the shape.
    """
    found: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, (dtype, shape) in shapes.items():
        end = at + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        found[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_bytes(t: Tensor) -> Any:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().data


def cast(t: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Cast a tensor on the CPU.

    Raises:
        InputError: a value is NaN or Inf, or becomes so.
    """
    found = t.detach().to("cpu", dtype)
    # float8 has no isfinite
    if dtype.is_floating_point and not bool(found.float().isfinite().all()):
        why = "holds NaN or Inf" if not bool(t.isfinite().all()) else f"has values beyond {dtype}"
        raise InputError(f"{what} {why}: write it in another dtype, or check the training")
    return found


def _edits(single: Single, changed: Changed) -> dict[str, list[tuple[Rows, Tensor]]]:
    """Tensor in the file -> its rows with new values.

    Raises:
        InputError: they do not fit.
    """
    made, path = single.architecture, single.checkpoint.path
    edits: dict[str, list[tuple[Rows, Tensor]]] = {}
    for part, tensors in changed.items():
        if part not in single.checkpoint.parts:
            ours = ", ".join(single.checkpoint.parts)
            raise InputError(f"changed: {path} has no {part}; it has {ours}")
        places = single.own_table(part)
        for name, t in fitting(tensors, made.shapes(part), f"the {part} of {path}").items():
            edits.setdefault(places[name].key, []).append((places[name], t))
    return edits


def fitting(
    changed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str
) -> dict[str, Tensor]:
    """The tensors of `changed` by the names in `shapes`.

    Raises:
        InputError: `what` does not have a name or a shape.
    """
    found = {}
    for given, t in changed.items():
        name = known(given, shapes)
        if name is None or tuple(t.shape) != tuple(shapes[name]):
            want = "has no such tensor" if name is None else f"has the shape {list(shapes[name])}"
            raise InputError(f"changed: {given}, {list(t.shape)}: {what} {want}")
        found[name] = t
    return found


def known(name: str, places: Iterable[str]) -> str | None:
    """The name in `places`, with or without ``text_model.``; None if there is none.

    transformers 4 puts it before the names of a text encoder, transformers 5 does not."""
    both = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((n for n in both if n in places), None)


def _edited(
    key: str, entry: Entry, file: BinaryIO, edits: list[tuple[Rows, Tensor]], path: Path
) -> Tensor:
    found = read(file, entry)
    for at, new in edits:
        new = cast(new, found.dtype, f"changed: the new {key} of {path}")
        place = found[at.first : at.last] if found.dim() else found
        place.copy_(at.turned(new).reshape(place.shape))
    return found


def _copy(source: BinaryIO, entry: Entry, target: BinaryIO) -> None:
    source.seek(entry.first)
    left = entry.last - entry.first
    while left:
        block = source.read(min(left, CHUNK))
        if not block:
            raise InputError(f"{source.name} became shorter while it was read: get it again")
        target.write(block)
        left -= len(block)
