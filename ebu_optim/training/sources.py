"""The sources of data.py: parquet files, folders by class, and the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..images import (
    ENDINGS,
    image_files,
    is_image,
    pixels_of,
    read_rgb,
    visible,
    warn_of_left_out,
)
from .fields import option

TRAIN, TEST = ("train",), ("test", "val")
MOST = 100_000  # classes; a column with a greater label does not hold classes
NAMED = 5  # number of unreadable images that a message names


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The source of labelled images, one of four, and which of them are used."""

    group: ClassVar[str] = "data"

    dataset_name: str | None = option(
        None, help="Data set on the hub, e.g. uoft-cs/cifar10.", exclusive="source"
    )
    parquet: list[Path] | None = option(
        None, help="Parquet files, or a folder of them.", exclusive="source"
    )
    train_data_dir: Path | None = option(
        None, help="Folder with one folder of images per class.", exclusive="source"
    )
    digits: bool = option(False, help="Use scikit-learn's 8x8 digits.", exclusive="source")
    dataset_config_name: str | None = option(None, help="Configuration of the data set on the hub.")
    image_column: str | None = option(None, help="Column of the images. Default: img or image.")
    label_column: str | None = option(
        None, help="Column of the labels. Default: label, fine_label or labels."
    )
    resolution: int | None = option(
        None, help="Height and width in pixels. Default: those of the images."
    )
    classes: list[str] | None = option(
        None, help="Use only these classes, by number or name. Default: all."
    )
    join_splits: bool = option(
        False,
        help="Join train and test into one set, for small data sets such as STL-10; a tenth is "
        "held out for the classifier.",
    )
    max_train_samples: int | None = option(
        None, help="Use only this many samples, the first ones after a fixed shuffle."
    )
    skip_unreadable: bool = option(
        False,
        help="Leave out images that cannot be read. Without it such images end the run with "
        "an error that names them.",
    )

    @property
    def given(self) -> bool:
        """Whether a source is given."""
        return bool(self.digits or self.parquet or self.train_data_dir or self.dataset_name)


class Item(NamedTuple):
    """An image before decoding (bytes or a path), its label, and its name in messages."""

    image: Any
    label: int
    name: str


#: Items, the classes' names, the source, and whether the test split must be held out of them.
Found = tuple[list[Item], list[str], str, bool]


def parquet_items(args: DataOptions, split: str) -> Found:
    files: list[Path] = []
    given = args.parquet or []
    for path in given:
        if not path.exists():
            raise InputError(f"--parquet {path}: there is no such file or folder")
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    files, held_out = _of_split(files, split)
    if not files:
        raise InputError(
            f"--parquet {given[0]}: "
            f"no parquet file of the {split} split (by their names: train..., test...)"
        )
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            f'--parquet needs pyarrow ({error}): pip install "ebu_optim[data]"'
        ) from error
    items: list[Item] = []
    names: list[str] | None = None
    for file in files:
        try:
            schema = parquet.read_schema(file)
            image = _column(schema.names, args.image_column, ("img", "image"), file)
            label = _column(
                schema.names, args.label_column, ("label", "fine_label", "labels"), file
            )
            table = parquet.read_table(file, columns=[image, label])
            hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise InputError(f"--parquet {file} cannot be read: {error}") from error
        feature = hub.get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names", names)
        for i, (cell, number) in enumerate(
            zip(table[image].to_pylist(), table[label].to_pylist(), strict=True)
        ):
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            items.append(_item(data, number, f"{file.name}, row {i}", label))
    return items, names or _numbers(items), f"{files[0].parent.name}, {split}", held_out


def folder_items(args: DataOptions, split: str) -> Found:
    root = args.train_data_dir or Path()
    if not root.is_dir():
        raise InputError(f"--train_data_dir {root}: there is no such folder")
    folders, held_out, beside = _folders(root), True, root
    classes = [p.name for p in folders]
    if folders and all(p.name.startswith((*TRAIN, *TEST)) for p in folders):  # not a class "train"
        classes = [p.name for f in _of_split(folders, "train")[0][:1] for p in _folders(f)]
        splits, held_out = _of_split(folders, split)
        beside = splits[0] if splits else root
        folders = _folders(beside) if splits else []
    if other := [p.name for p in folders if p.name not in classes]:
        raise InputError(
            f"--train_data_dir {root}: the {split} split has the class {other[0]}, which is not in "
            f"the train split: {', '.join(classes)}"
        )
    loose = [f for f in visible(beside) if f.is_file() and is_image(f)]
    items = [
        Item(file, classes.index(folder.name), str(file.relative_to(root)))
        for folder in folders
        for file in image_files(folder)
    ]
    if not items:
        own = f"; the {len(loose)} images in {beside} itself have no class" if loose else ""
        raise InputError(
            f"--train_data_dir {root}: no image ({', '.join(ENDINGS)}) in folders named by "
            f"class{own}"
        )
    warn_of_left_out(loose, beside)
    return items, classes, f"{root.name}, {split}", held_out


def _folders(root: Path) -> list[Path]:
    return [p for p in visible(root) if p.is_dir()]


def hub_items(args: DataOptions, split: str) -> Found:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f'--dataset_name needs datasets ({error}): pip install "ebu_optim[data]"'
        ) from error
    try:
        splits = datasets.get_dataset_split_names(args.dataset_name, args.dataset_config_name)
        found, held_out = _of_split([Path(s) for s in splits], split)
        if not found:
            raise InputError(f"--dataset_name {args.dataset_name}: no {split} split in {splits}")
        rows = datasets.load_dataset(
            args.dataset_name, args.dataset_config_name, split=found[0].name
        )
    except InputError:
        raise
    except Exception as error:  # the hub's client raises many types
        raise InputError(
            f"--dataset_name {args.dataset_name} cannot be downloaded ({type(error).__name__}: "
            f"{error}). Check the name and the network; the same command continues the download. "
            "Without a network give --parquet or --train_data_dir"
        ) from error
    image = _column(rows.column_names, args.image_column, ("img", "image"), args.dataset_name)
    label = _column(
        rows.column_names, args.label_column, ("label", "fine_label", "labels"), args.dataset_name
    )
    rows = rows.cast_column(image, datasets.Image(decode=False))
    feature = rows.features[label]
    items = []
    for i, row in enumerate(rows):
        cell = row[image] or {}
        data = cell.get("bytes") or cell.get("path")
        items.append(_item(data, row[label], f"row {i}", label))
    names = getattr(feature, "names", None) or _numbers(items)
    return items, names, f"{args.dataset_name}, {found[0].name}", held_out


def _item(image: Any, label: Any, name: str, column: str) -> Item:
    """An item whose label is checked.

    Raises:
        InputError: the label is not a whole number.
    """
    if not isinstance(label, int):
        raise InputError(
            f"{name}: the label in column {column} is {label!r}, not a whole number: number the "
            "classes from 0, or give --label_column, a column with such numbers"
        )
    return Item(image, int(label), name)


def _numbers(items: list[Item]) -> list[str]:
    """The numbers of the classes as names, for classes without names."""
    last = max(items, key=lambda item: item.label, default=None)
    if last is not None and last.label >= MOST:
        raise InputError(
            f"{last.name}: label {last.label} is too large for a class: give --label_column"
        )
    return [str(i) for i in range(last.label + 1)] if last else []


def _of_split(paths: list[Path], split: str) -> tuple[list[Path], bool]:
    """The paths of a split by their names, and whether the test split must be held out."""
    test = [p for p in paths if p.name.startswith(TEST)]
    train = [p for p in paths if p.name.startswith(TRAIN)] or [p for p in paths if p not in test]
    return (test, False) if split == "test" and test else (train, not test)


def _column(names: Sequence[str], given: str | None, usual: Sequence[str], where: Any) -> str:
    for name in [given] if given else usual:
        if name in names:
            return name
    raise InputError(
        f"{where} has no column {given or ' or '.join(usual)}; it has {', '.join(names)}: "
        "give --image_column and --label_column"
    )


def decode(
    items: list[Item], classes: list[str], source: str, *, resolution: int | None, skip: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Decode images: returns images (n, C, H, W) uint8, labels (n,), and the unreadable images.

    Raises:
        InputError: images cannot be read (unless `skip`) or have several sizes; a label is out of
            range.
    """
    images, labels, bad = [], [], []
    for item in tqdm(items, desc=f"reading {source}", disable=len(items) < 5000):
        try:
            images.append(_pixels(item.image, resolution))
        except Exception as error:  # PIL raises many types for files that are not images
            bad.append(f"{item.name} ({error})")
            continue
        if not 0 <= item.label < len(classes):
            raise InputError(
                f"{source}: {item.name} has label {item.label} of {len(classes)} classes"
            )
        labels.append(item.label)
    if bad:
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        text = (
            f"{source}: {len(bad)} of {len(items)} images cannot be read: "
            f"{', '.join(bad[:NAMED])}{more}"
        )
        if not skip:
            raise InputError(f"{text}; repair them, or leave them out with --skip_unreadable")
        print(f"warning: {text}; left out", file=sys.stderr)
    sizes = {tuple(x.shape) for x in images}
    if len(sizes) > 1:
        raise InputError(
            f"{source}: images of several sizes {sorted(sizes)[:2]}: give --resolution"
        )
    if not images:
        raise InputError(f"{source}: no image can be read")
    return torch.stack(images), torch.tensor(labels), tuple(bad)


def _pixels(image: Any, resolution: int | None) -> Tensor:
    if image is None:
        raise ValueError("the cell is empty")
    rgb = read_rgb(image)
    if resolution and rgb.size != (resolution, resolution):
        side = min(rgb.size)
        left, top = ((a - side) // 2 for a in rgb.size)
        rgb = rgb.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
        )
    return pixels_of(rgb)
