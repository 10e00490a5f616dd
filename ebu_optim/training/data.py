"""Labelled images for training, from any of four sources, in main memory.

    --dataset_name uoft-cs/cifar10     the hub, through `datasets`
    --parquet data/cifar10             parquet files, or a folder of them
    --train_data_dir images            one folder of images for each class
    --digits                           the 1,797 8x8 digits of scikit-learn; no download

Parquet files and folders whose names begin with "train" and "test" are the two splits. Without a
test split, a tenth of the training images, chosen with a fixed seed, is held out as one. Names that
begin with a dot are skipped; a warning names other files that are not images. Images are read by
:func:`ebu_optim.images.read_rgb`: turned by their EXIF orientation, transparency over white.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..modules import tensor_hash
from .sources import DataOptions, decode, folder_items, hub_items, parquet_items


class Data(NamedTuple):
    """Images (n, C, H, W) uint8, labels (n,) int64, the classes' names, the source, and the
    unreadable images that were skipped."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()

    def made_of(self) -> dict[str, str]:
        """The source, and a hash of the images and labels."""
        return {"data": self.source, "images": tensor_hash(self.images, self.labels)}

    def only(self, classes: Iterable[int]) -> Data:
        keep = torch.isin(self.labels, torch.tensor(list(classes), dtype=torch.long))
        return self._replace(images=self.images[keep], labels=self.labels[keep])


def load(args: DataOptions, split: str = "train") -> Data:
    """Load the images of the source that the options name.

    Args:
        split: "train", "test", or "all" for the images of the base model: with --join_splits both
            splits, else "train".

    Raises:
        InputError: the source is not given or cannot be reached; it has no images, or none of a
            class; images are unreadable or of several sizes; labels are not whole numbers.
    """
    asked, joined = "test" if split == "test" else "train", args.join_splits and not args.digits
    data, held_out = _read(args, "train" if joined else asked)
    if joined:
        if held_out:
            raise InputError(f"--join_splits: {data.source} has no test split to join")
        test, _ = _read(args, "test")
        data = data._replace(
            images=torch.cat([data.images, test.images]),
            source=f"{data.source} and test",
            labels=torch.cat([data.labels, test.labels]),
            skipped=data.skipped + test.skipped,
        )
        held_out = split != "all"
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))
    if held_out:
        cut = len(order) // 10
        order = order[:cut] if split == "test" else order[cut:]
        data = data._replace(source=f"{data.source} (a tenth held out as test)")
    if split != "test" and args.max_train_samples:
        order = order[: args.max_train_samples]
    order = order.sort().values
    if not len(order):
        raise InputError(f"{data.source}: no image is left in the {split} split")
    return data._replace(images=data.images[order], labels=data.labels[order])


def load_for(args: DataOptions, info: Mapping[str, Any]) -> Data:
    """The "train" images for a model.

    Raises:
        InputError: their classes or shape are not the model's; see also `load`.
    """
    real = load(args)
    if list(real.classes) != info["classes"]:
        raise InputError(
            f"{real.source} has other classes than the model: {', '.join(real.classes[:5])}, ..."
        )
    if list(real.images.shape[1:]) != info["shape"]:
        raise InputError(
            f"{real.source} has images of {tuple(real.images.shape[1:])}, the model of "
            f"{tuple(info['shape'])}: give --resolution"
        )
    return real


def _read(args: DataOptions, split: str) -> tuple[Data, bool]:
    """A split, and whether the test split must be held out of it because the source has none."""
    if args.digits:
        if args.classes:
            raise InputError("--classes: --digits always uses all ten classes; leave it out")
        return _digits(split), False
    if not args.given:
        raise InputError(
            "no data: give one of --dataset_name, --parquet, --train_data_dir, --digits"
        )
    find = parquet_items if args.parquet else folder_items if args.train_data_dir else hub_items
    items, classes, source, held_out = find(args, split)
    if args.classes:
        ids = class_ids(args.classes, classes, "--classes")
        source = f"{source}, {len(ids)} of its {len(classes)} classes"
        number, classes = {c: i for i, c in enumerate(ids)}, [classes[c] for c in ids]
        items = [i._replace(label=number[i.label]) for i in items if i.label in number]
    images, labels, skipped = decode(
        items, classes, source, resolution=args.resolution, skip=args.skip_unreadable
    )
    if split != "test":
        _check_classes(labels, classes, source)
    return Data(images, labels, tuple(classes), source, skipped), held_out


def _check_classes(labels: Tensor, classes: Sequence[str], source: str) -> None:
    there = set(labels.tolist())
    if empty := [name for i, name in enumerate(classes) if i not in there]:
        named = f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}"
        raise InputError(
            f"{source}: no image of class {named}: the model could not learn it. Add images, "
            "delete its folder, or name the other classes with --classes"
        )


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], the range of the models, with the same scale for all images."""
    return images.float().div_(127.5).sub_(1)


class Batches:
    """Endless shuffled batches of images (n, C, H, W), uint8 or float32 in [-1, 1].

    A batch depends only on its number, so that a run can be resumed at any batch. The batches i of
    p processes together are batch i of one process with p times the batch size."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
        flip: bool = False,
        device: Any = "cpu",
    ) -> None:
        self.images, self.labels, self.size, self.seed = images, labels, batch_size, seed
        self.process, self.processes, self.flip, self.device = process, processes, flip, device
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """The number of batches in which every image appears at least once."""
        return math.ceil(len(self.labels) / (self.size * self.processes))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) float32 in [-1, 1] and labels (b,) on the device."""
        n = len(self.labels)
        first = (i * self.processes + self.process) * self.size
        positions = range(first, first + self.size)
        epochs = {p // n for p in positions}
        self._orders = {e: self._orders.get(e, self._order(e, n)) for e in epochs}
        rows = torch.stack([self._orders[p // n][p % n] for p in positions])
        x, labels = self.images[rows], self.labels[rows]
        x = to_float(x) if x.dtype == torch.uint8 else x
        if self.flip:
            g = torch.Generator().manual_seed((self.seed * 1_000_003 + 500_009 + i) % 2**32)
            turned = torch.rand(self.processes, self.size, generator=g)[self.process] < 0.5
            x[turned] = x[turned].flip(-1)
        return x.to(self.device), labels.to(self.device)

    def _order(self, epoch: int, n: int) -> Tensor:
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        return torch.randperm(n, generator=g)


def noise_images(n: int, generator: torch.Generator, real: Tensor) -> Tensor:
    """n images (n, C, H, W) of a reject class, in three equal parts.

    The parts are uniform noise, Gaussian noise of several widths clamped to [-1, 1], and real
    images (m, C, H, W) with shuffled pixels."""
    shape, a = real.shape[1:], n // 3
    uniform = torch.rand(a, *shape, generator=generator) * 2 - 1
    width = torch.rand(a, 1, 1, 1, generator=generator) * 0.8 + 0.2
    gaussian = (torch.randn(a, *shape, generator=generator) * width).clamp(-1, 1)
    pick = torch.randint(len(real), (n - 2 * a,), generator=generator)
    order = torch.rand(n - 2 * a, math.prod(shape[1:]), generator=generator).argsort(dim=1)
    shuffled = real[pick].flatten(2).gather(2, order[:, None].expand(-1, shape[0], -1))
    return torch.cat([uniform, gaussian, shuffled.view(-1, *shape)])


def class_ids(given: Sequence[str], classes: Sequence[str], option: str) -> list[int]:
    """The class numbers for given numbers or names.

    If any name is a number, such as in folders 1, 10, 2, a given number is a name.

    Raises:
        InputError: there is no such class.
    """
    ids = []
    by_number = not any(name.isdigit() for name in classes)
    for text in given:
        number = classes.index(text) if text in classes else None
        if number is None and by_number and text.isdigit() and int(text) < len(classes):
            number = int(text)
        if number is None:
            said = f"{', '.join(list(classes)[:10])}{', ...' if len(classes) > 10 else ''}"
            there = f"0..{len(classes) - 1} ({said})" if by_number else said
            raise InputError(f"{option} {text}: there is no such class; give one of {there}")
        ids.append(number)
    return sorted(set(ids))


def _digits(split: str) -> Data:
    from ..worlds import digits  # here, as it needs scikit-learn of the extra "examples"

    x, y, x_test, y_test = digits.images()
    x, y = (x, y) if split == "train" else (x_test, y_test)
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    return Data(images, y, tuple(map(str, digits.CLASSES)), f"scikit-learn digits, {split}")
