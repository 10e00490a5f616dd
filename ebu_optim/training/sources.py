"""Where data.py's images come from: parquet files, folders by class, the hub."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TRAIN, TEST = ("train",), ("test", "val")
NAMED = 5  # unreadable images that a message names; it counts all


class Item(NamedTuple):
    """An image that has not been decoded: bytes or a path; its name in messages."""

    image: Any
    label: int
    name: str


#: Items, the classes' names, where they came from, and whether the test split is to be held out.
Found = tuple[list[Item], list[str], str, bool]


def parquet_items(args: argparse.Namespace, split: str) -> Found:
    files: list[Path] = []
    for path in args.parquet:
        if not path.exists():
            raise InputError(f"--parquet {path}: there is no such file or folder")
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    files, held_out = _of_split(files, split)
    if not files:
        raise InputError(
            f"--parquet {args.parquet[0]}: "
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
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"--parquet {file} cannot be read: {error}") from error
        hub = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = hub.get("info", {}).get("features", {}).get(label, {})
        names = feature.get("names", names)
        for i, (cell, number) in enumerate(
            zip(table[image].to_pylist(), table[label].to_pylist(), strict=True)
        ):
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            items.append(Item(data, number, f"{file.name}, row {i}"))
    count = max(item.label for item in items) + 1 if items else 0
    return (
        items,
        names or [str(i) for i in range(count)],
        f"{files[0].parent.name}, {split}",
        held_out,
    )


def folder_items(args: argparse.Namespace, split: str) -> Found:
    root = args.train_data_dir
    if not root.is_dir():
        raise InputError(f"--train_data_dir {root}: there is no such folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    held_out = True
    if folders and all(p.name.startswith((*TRAIN, *TEST)) for p in folders):  # not a class "train"
        folders, held_out = _of_split(folders, split)
        folders = sorted(p for f in folders[:1] for p in f.iterdir() if p.is_dir())
    items = [
        Item(file, i, str(file.relative_to(root)))
        for i, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in ENDINGS
    ]
    if not items:
        raise InputError(
            f"--train_data_dir {root}: no image ({', '.join(ENDINGS)}) in folders named by class"
        )
    return items, [p.name for p in folders], f"{root.name}, {split}", held_out


def hub_items(args: argparse.Namespace, split: str) -> Found:
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
    except Exception as error:  # the hub's client raises a dozen kinds
        raise InputError(
            f"--dataset_name {args.dataset_name} cannot be had ({type(error).__name__}: {error}). "
            "Look at the name and the network; the same command goes on with what was downloaded. "
            "Without a network give --parquet or --train_data_dir"
        ) from error
    image = _column(rows.column_names, args.image_column, ("img", "image"), args.dataset_name)
    label = _column(
        rows.column_names, args.label_column, ("label", "fine_label", "labels"), args.dataset_name
    )
    rows = rows.cast_column(image, datasets.Image(decode=False))
    feature = rows.features[label]
    items = [
        Item(row[image]["bytes"] or row[image]["path"], row[label], f"row {i}")
        for i, row in enumerate(rows)
    ]
    count = max(item.label for item in items) + 1
    names = getattr(feature, "names", None) or [str(i) for i in range(count)]
    return items, names, f"{args.dataset_name}, {found[0].name}", held_out


def _of_split(paths: list[Path], split: str) -> tuple[list[Path], bool]:
    """Those of a split by their names, and whether it has to be held out of the training split."""
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
    """Images (n, C, H, W) uint8, labels (n,), and what was left out because it cannot be read."""
    images, labels, bad = [], [], []
    for item in tqdm(items, desc=f"reading {source}", disable=len(items) < 5000):
        try:
            images.append(_pixels(item.image, resolution))
        except Exception as error:  # PIL raises many kinds on what is no image
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
            raise InputError(f"{text}; put them right, or leave them out with --skip_unreadable")
        print(f"warning: {text}; left out", file=sys.stderr)
    sizes = {tuple(x.shape) for x in images}
    if len(sizes) > 1:
        raise InputError(
            f"{source}: images of several sizes {sorted(sizes)[:2]}: give --resolution"
        )
    if not images:
        raise InputError(f"{source}: there is no image that can be read")
    return torch.stack(images), torch.tensor(labels), tuple(bad)


def _pixels(image: Any, resolution: int | None) -> Tensor:
    if isinstance(image, bytes):
        image = io.BytesIO(image)
    with Image.open(image) as opened:
        rgb = opened.convert("RGB")
    if resolution and rgb.size != (resolution, resolution):
        side = min(rgb.size)
        left, top = ((a - side) // 2 for a in rgb.size)
        rgb = rgb.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, (left, top, left + side, top + side)
        )
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()
