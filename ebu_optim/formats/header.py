"""The header of a safetensors file, which lists the tensors, and single tensors of the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
LONGEST = 100_000_000  # bytes of a header, the limit of safetensors' own reader


class Entry(NamedTuple):
    """A tensor in the file.

    Attributes:
        dtype: safetensors' name of the dtype.
        shape: the tensor's shape.
        first, last: offsets in the file at which its bytes begin and end.
    """

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class Header(NamedTuple):
    path: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        InputError: the file is missing, incomplete or not safetensors (a pickle, GGUF, a pointer
            of Git LFS).
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the .safetensors file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(8)
            _check_kind(path, begin, size)
            length = int.from_bytes(begin, "little")
            if length > min(size - 8, LONGEST):
                raise _damaged(path, f"its header would end at byte {length + 8} of {size}")
            text = file.read(length)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: check the path") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _parsed(path, json.loads(text), length + 8, size)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _damaged(path, f"its header is damaged ({error})") from error


def read(file: BinaryIO, entry: Entry, rows: tuple[int, int] | None = None) -> Tensor:
    """Read a tensor of the opened file in its stored dtype.

    Args:
        rows: reads only the rows from the first to before the second number.
    """
    length, shape, first = entry.last - entry.first, entry.shape, entry.first
    if rows is not None and shape:
        each = length // shape[0] if shape[0] else 0
        first += rows[0] * each
        length, shape = (rows[1] - rows[0]) * each, (rows[1] - rows[0], *shape[1:])
    data = bytearray(length)
    file.seek(first)
    if file.readinto(data) != length:  # type: ignore[attr-defined]
        raise InputError(f"{file.name} became shorter while it was read: get it again")
    if not length:
        return torch.empty(shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(shape)


def _check_kind(path: Path, begin: bytes, size: int) -> None:
    if not size:
        raise InputError(f"{path} is empty: get it again")
    if path.suffix in PICKLES or begin[:4] == b"PK\3\4" or begin[:2] in (b"\x80\2", b"\x80\4"):
        raise InputError(
            f"{path} is a pickle, which can run foreign code when it is opened: get the "
            "model's .safetensors, or make one with state = torch.load(path, weights_only=True); "
            'safetensors.torch.save_file(state.get("state_dict", state), "model.safetensors")'
        )
    if begin[:4] == b"GGUF":
        raise InputError(f"{path} is GGUF, whose weights are quantized: get the .safetensors")
    if begin == b"version ":
        raise InputError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull`")
    if size < 8:
        raise _damaged(path, f"it has {size} bytes")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is not a complete safetensors file: {what}; get it again")


def _parsed(path: Path, found: dict, start: int, size: int) -> Header:
    metadata = found.pop("__metadata__", None) or {}
    tensors = {}
    for name, said in found.items():
        (first, last), shape = said["data_offsets"], tuple(said["shape"])
        entry = Entry(said["dtype"], shape, start + first, start + last)
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{path}: {name} is {entry.dtype}, which is not supported: give a file in float32, "
                "float16, bfloat16 or float8"
            )
        if last - first != math.prod(shape) * DTYPES[entry.dtype].itemsize:
            raise ValueError(f"{name} has {last - first} bytes for the shape {list(shape)}")
        tensors[name] = entry
    end = start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.first, entry.last)):
        if entry.first != end:
            raise ValueError(f"tensors overlap or leave a hole at byte {end}")
        end = entry.last
    if end != size:
        raise _damaged(path, f"it has {size} bytes, and its header describes {end}")
    if not tensors:
        raise _damaged(path, "it holds no tensors")
    return Header(path, tensors, metadata)
