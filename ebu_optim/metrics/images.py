"""Images as FID's extractor and the text-to-image judges take them: uint8, RGB, of one size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .._extras import require
from ..images import ENDINGS, image_files, pixels_of, read_rgb
from .naming import name_of

NAMED = 5  # how many unreadable files a message names; it counts all of them


class RGBImages(Dataset[Tensor]):
    """Items: (3, H, W) uint8.

    Float images must be in [-1, 1] and become round((x + 1) * 127.5), the same for every image.
    Some published code stretches each image to its own minimum and maximum, which changes FID. One
    channel is repeated three times.

    Args:
        source: (n, C, H, W) with C of 1 or 3, uint8 or float; or a folder of images, including
            its subfolders; hidden names are skipped, other files are left out with a warning.
        name: the argument's name in messages.
        unreadable: "raise" or "skip" files that are not complete images; they are in ``skipped``.
        least: how many images there must be.
    """

    def __init__(
        self,
        source: Tensor | str | os.PathLike[str],
        name: str,
        unreadable: str = "raise",
        *,
        least: int = 1,
    ) -> None:
        if unreadable not in ("raise", "skip"):
            raise ValueError(f'unreadable must be "raise" or "skip"; got {unreadable!r}')
        name = name_of(name)
        self.skipped: list[str] = []
        self.source: Tensor | list[Path]
        if isinstance(source, Tensor):
            _check(source, name)
            self.source = source
        else:
            self.source = self._folder(Path(source), name, unreadable)
        if len(self.source) < least:
            raise ValueError(
                f"{name} must hold at least {least} image{'s' * (least > 1)}; got "
                f"{len(self.source)}"
            )

    def _folder(self, folder: Path, name: str, unreadable: str) -> list[Path]:
        if not folder.is_dir():
            raise ValueError(f"{name} must be a tensor or a folder of images; no folder {folder}")
        files = image_files(folder)
        if not files:
            raise ValueError(f"{name}: {folder} holds no image ({', '.join(ENDINGS)})")
        require("PIL.Image", "metrics")  # otherwise each file below would look like a broken image
        sizes: dict[tuple[int, ...], Path] = {}
        whole = []
        for file in files:
            try:
                size = tuple(read_image(file).shape)
            except Exception as error:  # PIL raises many types for files that are not images
                self.skipped.append(f"{file.relative_to(folder)} ({error})")
                continue
            whole.append(file)
            sizes.setdefault(size, file)
        if self.skipped and unreadable == "raise":
            more = len(self.skipped) - NAMED
            shown = ", ".join(self.skipped[:NAMED]) + (f" and {more} more" if more > 0 else "")
            raise ValueError(
                f"{name}: {len(self.skipped)} of {len(files)} files in {folder} cannot be read: "
                f'{shown}; delete them, or leave them out with unreadable="skip"'
            )
        if len(sizes) > 1:
            (a, file_a), (b, file_b) = list(sizes.items())[:2]
            raise ValueError(
                f"{name}: the images have several sizes, {file_a.name} is {a[2]}x{a[1]} and "
                f"{file_b.name} is {b[2]}x{b[1]}; resize them to one size"
            )
        return whole

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Tensor:
        if not isinstance(self.source, Tensor):
            return read_image(self.source[i])
        return to_uint8(self.source[i].detach().cpu()).expand(3, -1, -1)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield (<= size, 3, H, W) uint8, in order."""
        for start in range(0, len(self), size):
            yield torch.stack([self[i] for i in range(start, min(start + size, len(self)))])


def to_uint8(x: Tensor) -> Tensor:
    """Convert float in [-1, 1] to 0..255, as an image is saved; return uint8 unchanged."""
    if x.dtype == torch.uint8:
        return x
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def read_image(file: Path) -> Tensor:
    """Return (3, H, W) uint8, whatever the file's mode; see :func:`ebu_optim.images.read_rgb`."""
    return pixels_of(read_rgb(file))


def _check(x: Tensor, name: str) -> None:
    if x.dim() != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
        raise ValueError(f"{name} must have shape (n, C, H, W), C of 1 or 3; got {tuple(x.shape)}")
    if x.dtype == torch.uint8 or not len(x):
        return
    if not x.is_floating_point():
        raise ValueError(f"{name} must be uint8 in 0..255 or float in [-1, 1]; got {x.dtype}")
    low, high = (float(v) for v in x.detach().aminmax())
    if not (low >= -1.001 and high <= 1.001):  # true for NaN, too
        raise ValueError(
            f"{name}: float images must be in [-1, 1]; these reach from {low:.4g} to {high:.4g}; "
            "rescale them, or give uint8 in 0..255"
        )
    if low >= 0:
        raise ValueError(
            f"{name}: float images must be in [-1, 1]; these have no pixel below 0, so they seem "
            "to be in [0, 1]; give 2 * x - 1, or, if they are right, uint8 in 0..255"
        )
