"""Image files: which files of a folder are images, and the pixels of one, for all that read any."""

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
#: What shows through where an image is transparent, RGB.
BACKGROUND = (255, 255, 255)
NAMED = 3  # files left out that a warning names; it counts all


def image_files(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders that are images by their ending, sorted. Names that
    begin with a dot are skipped, folders' too; a warning names what else is left out."""
    files = sorted(f for f in visible(folder, "**/*") if f.is_file())
    found = [f for f in files if is_image(f)]
    warn_of_left_out([f for f in files if not is_image(f)], folder)
    return found


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What the pattern finds in a folder, sorted, without hidden names: those with a part that
    begins with a dot, as Jupyter's .ipynb_checkpoints and macOS's ._ files do."""
    return sorted(
        p
        for p in folder.glob(pattern)
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def is_image(file: Path) -> bool:
    """Whether it ends as an image."""
    return file.suffix.lower() in ENDINGS


def warn_of_left_out(files: list[Path], folder: Path) -> None:
    """A warning that names files which are not taken for images."""
    if files:
        named = ", ".join(str(f.relative_to(folder)) for f in files[:NAMED])
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        warnings.warn(
            f"{folder}: no image by its place and ending, left out: {named}{more}", stacklevel=3
        )


def read_rgb(file: str | os.PathLike[str] | bytes) -> Any:
    """A file, or its bytes, as a PIL image of mode RGB, 8 bits a channel.

    It is turned as EXIF says. 16 bits of gray are scaled to 8 (v / 257, rounded). What is
    transparent shows `BACKGROUND`, white.

    Raises:
        OSError, ValueError, ...: PIL's, of what is no whole image; one whose numbers have no known
            range (32 bits a channel, or floats).
    """
    image: Any = require("PIL.Image", "metrics")
    ops: Any = require("PIL.ImageOps", "metrics")
    with image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
        kind = opened.format
        whole = ops.exif_transpose(opened)
    gray = whole.mode.startswith("I;16") or (whole.mode == "I" and kind == "PNG")
    if whole.mode in ("I", "F") and not gray:
        raise ValueError(
            f"its mode {whole.mode}, 32 bits a channel, has no known range: save it in 8 or 16 bits"
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
    """Of 16 bits of gray, which PIL would cut at 255; LA where one gray is transparent."""
    values = np.asarray(whole).astype(np.int64)
    pixels = ((values + 128) // 257).astype(np.uint8)
    clear = whole.info.get("transparency")
    if clear is None:
        return image.fromarray(pixels)
    alpha = np.where(values == clear, 0, 255).astype(np.uint8)
    return image.merge("LA", [image.fromarray(pixels), image.fromarray(alpha)])


def pixels_of(image: Any) -> Tensor:
    """(3, H, W) uint8 of a PIL image of mode RGB."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
