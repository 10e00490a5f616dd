"""Judges of a whole set of images: FID against real images, as published code computes it.

The mean and the covariance of a set's features are kept in a file under a key of everything that
they depend on. No set is therefore looked at twice, and several models share the real images'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import replacing
from ..images import ENDINGS, image_files, read_rgb
from ..manifest import contents, key, sha256
from ..metrics import NotComputed, inception
from ..metrics.fid import inception_file
from ..metrics.frechet import Moments, distance_of
from ..metrics.naming import called
from .pictures import ahead, as_jpeg
from .protocol import Asked

REAL, WEIGHTS = "--files coco", "--files inception"
#: Images that pass through Inception at a time.
BATCH = 16
NAMED = 5  # how many unreadable files a message names; it counts all of them

Statistics = tuple[Tensor, Tensor]
Prepared = Callable[[Any], Tensor]


class SetJudge(NamedTuple):
    """A judge of a set of images.

    Attributes:
        look: (files of at least two images, a key of their contents, the forgotten targets) ->
            the figure.
        identity: identifies the judge and what it compares with.
        counts: (an image, the forgotten targets) -> whether it belongs to the set.
    """

    look: Callable[[Sequence[Path], str, Sequence[str]], float]
    identity: str
    counts: Callable[[Asked, Sequence[str]], bool] = lambda _asked, _forget: True


class Features(NamedTuple):
    """The features of a network on images that are prepared in one way.

    Attributes:
        kind: the name of the preparation, in `inception.PREPARED`.
        network: opens the network.
        by: start of the hash of its weights.
        keep: the folder for statistics; None keeps none.
    """

    kind: str
    network: Callable[[], nn.Module]
    by: str
    device: str
    keep: Path | None

    def statistics(
        self, of: Sequence[Path], content: str, said: tuple[str, str], saved: str = "png"
    ) -> Statistics:
        """The statistics of image files, computed or read.

        Args:
            content: a key of their contents.
            said: what they are, and the remedy for those that cannot be read.
            saved: "jpeg" compresses them first, see `Protocol.saved`.
        """
        name = key(self.kind, self.by, self.device, content)
        file = None if self.keep is None else self.keep / f"{name}.npz"
        if file is not None and file.is_file():
            return read(file, f"the statistics {file}", "delete the file to compute it again")
        prepared = inception.PREPARED[self.kind]
        seen = (lambda x: prepared(as_jpeg(x))) if saved == "jpeg" else prepared
        found = _gathered(of, seen, self, *said)
        if file is not None:
            with replacing(file) as work:
                np.savez(work, mu=found[0].numpy(), sigma=found[1].numpy())
        return found


@contextmanager
def weights_given_as(option: str) -> Iterator[None]:
    """Make errors about Inception's weights in the block an InputError that names the option."""
    with called(inception_weights=option):
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            raise InputError(str(error)) from error


def open_fid(kind: str, files: Mapping[str, Path], device: str, keep: Path | None) -> SetJudge:
    """FID by the preparation `kind` of `inception.PREPARED`.

    Args:
        files: ``coco``: a folder of real images, or their statistics as .npz; ``inception``: the
            weights.
        keep: the folder for statistics; None keeps none.

    Raises:
        NotComputed: the real images are not given, or the weights are not to be had.
        InputError: a file or an image does not fit.
    """
    if "coco" not in files:
        raise NotComputed(f"the real images are not given: {REAL}=FOLDER, or a .npz of them")
    with weights_given_as(WEIGHTS):
        weights = inception_file(files.get("inception"), progress=True)
    by = sha256(weights)
    features = Features(kind, cache(lambda: inception.network(weights, device)), by, device, keep)
    if files["coco"].is_dir():
        real = _real(files["coco"])
        content, many = contents(real), f"n={len(real)}"
        reference = features.statistics(real, content, (f"{REAL}={files['coco']}", "delete them"))
    else:
        content, many = sha256(files["coco"])[:16], "npz"
        reference = read(files["coco"], f"{REAL}={files['coco']}", "give statistics of Inception")

    def look(pictures: Sequence[Path], content: str, _: Sequence[str]) -> float:
        return distance_of(features.statistics(pictures, content, DRAWN), reference)

    return SetJudge(look, f"{by[:8]} {many} {content}")


#: What a message calls the generated images, and the remedy.
DRAWN = "the images", "delete them to generate them again"


def _real(folder: Path) -> list[Path]:
    found = image_files(folder)
    if len(found) < 2:
        raise InputError(
            f"{REAL}={folder}: FID needs at least two real images, and the folder holds "
            f"{len(found)} ({', '.join(ENDINGS)})"
        )
    return found


def read(file: Path, what: str, remedy: str) -> Statistics:
    """The statistics in a .npz with mu (2048,) and sigma (2048, 2048), float64.

    Raises:
        InputError: they are not there.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            mu, sigma = (torch.from_numpy(opened[name]).double() for name in ("mu", "sigma"))
        if mu.dim() != 1 or sigma.shape != (len(mu), len(mu)) or len(mu) != inception.FEATURES:
            raise ValueError(f"mu has shape {tuple(mu.shape)}, sigma {tuple(sigma.shape)}")
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("it holds NaN or Inf")
    except Exception as error:  # NumPy raises many types for files that it did not write
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{what} is no .npz with mu ({inception.FEATURES},) and sigma "
            f"({inception.FEATURES}, {inception.FEATURES}): {why}; {remedy}"
        ) from error
    return mu, sigma


def _gathered(
    files: Sequence[Path],
    prepared: Prepared,
    features: Features,
    what: str,
    remedy: str,
) -> Statistics:
    """The statistics of files; `BATCH` of them are in memory at a time, and the next ones."""
    found, broken, network = Moments(), [], features.network()

    def batch(i: int) -> list[Tensor]:
        some = []
        for file in files[i : i + BATCH]:
            try:
                # without EXIF's rotation, as in published code
                some.append(prepared(read_rgb(file, rotate=False)))
            except Exception as error:  # PIL raises many types for files that are not images
                broken.append(f"{file.name} ({error})")
        return some

    starts = range(0, len(files), BATCH)
    for some in tqdm(ahead(batch, starts), "Inception", total=len(starts)):
        if not broken:  # else the files that are left are only checked
            with torch.no_grad():
                found.add(network(torch.stack(some).to(features.device)))
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise InputError(
            f"{what}: {len(broken)} of {len(files)} files cannot be read: "
            f"{', '.join(broken[:NAMED])}{more}; {remedy}"
        )
    return found.statistics()
