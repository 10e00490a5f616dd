"""Image files: which files of a folder are images, and how an image is read into pixels."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._extras import require

ENDINGS = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
#: The color (RGB) behind the transparent parts of an image.
BACKGROUND = (255, 255, 255)
NAMED = 3  # how many files that are left out a warning names; it counts all of them


def image_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders that have an image's ending, sorted.

    Files and folders whose names begin with a dot are skipped. A warning names the other files
    that are left out.
    """
    files = sorted(f for f in visible(folder, "**/*") if f.is_file())
    found = [f for f in files if is_image(f)]
    warn_of_left_out([f for f in files if not is_image(f)], folder)
    return found


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the paths that match the pattern in a folder, sorted, without hidden ones.

    A path is hidden if one of its parts begins with a dot, such as Jupyter's .ipynb_checkpoints
    and macOS's ._ files.
    """
    return sorted(
        p
        for p in folder.glob(pattern)
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def is_image(file: Path) -> bool:
    """Whether the file name has an image's ending."""
    return file.suffix.lower() in ENDINGS


def warn_of_left_out(files: list[Path], folder: Path) -> None:
    """Warn about files that are not taken for images; the warning names the first of them."""
    if files:
        named = ", ".join(str(f.relative_to(folder)) for f in files[:NAMED])
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        warnings.warn(
            f"{folder}: files without an image's place and ending are left out: {named}{more}",
            stacklevel=3,
        )


def read_rgb(file: str | os.PathLike[str] | bytes, *, rotate: bool = True) -> Any:
    """Return an image file, or the bytes of one, as a PIL image of mode RGB, 8 bits a channel.

    The image is rotated as its EXIF data says, unless `rotate` is false. 16-bit gray is scaled to
    8 bits (v / 257, rounded). Transparent parts show `BACKGROUND`, white.

    Raises:
        OSError: PIL cannot read the image. PIL raises other errors for some damaged files.
        ValueError: the values have no known range (32 bits a channel, or floats).
    """
    image: Any = require("PIL.Image", "metrics")
    ops: Any = require("PIL.ImageOps", "metrics")
    with image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        kind = opened.format
        whole = ops.exif_transpose(opened) if rotate else opened.copy()
    gray = whole.mode.startswith("I;16") or (whole.mode == "I" and kind == "PNG")
    if whole.mode in ("I", "F") and not gray:
        raise ValueError(
            f"mode {whole.mode}: 32 bits a channel have no known range; save it in 8 or 16 bits"
        )
    if gray:
        whole = _eight_bits(whole, image)
    palette = getattr(whole.palette, "mode", "") if whole.mode == "P" else ""
    clear = whole.mode in ("LA", "PA", "RGBA", "RGBa") or palette.endswith("A")
    if not clear and "transparency" not in whole.info:
        return whole.convert("RGB")
    behind = image.new("RGBA", whole.size, (*BACKGROUND, 255))
    return image.alpha_composite(behind, whole.convert("RGBA")).convert("RGB")


def _eight_bits(whole: Any, image: Any) -> Any:
    """Scale 16-bit gray to 8 bits (PIL would clip at 255); mode LA if one gray is transparent."""
    values = np.asarray(whole).astype(np.int64)
    pixels = ((values + 128) // 257).astype(np.uint8)
    clear = whole.info.get("transparency")
    if clear is None:
        return image.fromarray(pixels)
    alpha = np.where(values == clear, 0, 255).astype(np.uint8)
    return image.merge("LA", [image.fromarray(pixels), image.fromarray(alpha)])


def pixels_of(image: Any) -> Tensor:
    """Return the pixels of a PIL image of mode RGB, (3, H, W) uint8."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
