"""The pictures of one model on disk, each under a key of all that made it: nothing is drawn
twice, whichever protocol asks, whoever judges, and where a run was killed."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import need_disk, replacing
from ..images import pixels_of, read_rgb
from ..manifest import key
from ..text_to_image import drawing
from ..text_to_image.families import named
from .protocol import Asked, Sampling
from .samplers import noise, scheduler

#: Bytes a pixel of a photograph as PNG takes, about.
PNG = 1.6


class Pictures:
    """Args:
    folder: of all models' pictures.
    model: its manifest, see `results.made_of`.
    whose: what messages call the model.
    """

    def __init__(self, folder: Path, model: Mapping[str, str], whose: str) -> None:
        self.model, self.whose = dict(model), whose
        self.folder = folder / key(self.model)

    def file(self, sampling: Sampling, asked: Asked) -> Path:
        return self.folder / f"{key(made_of(sampling, asked))}.png"

    def missing(self, sampling: Sampling, asked: Iterable[Asked]) -> dict[Path, Asked]:
        """What is still to be drawn; what is asked for twice, once."""
        each = {self.file(sampling, one): one for one in asked}
        return {file: one for file, one in each.items() if not file.is_file()}

    def draw(
        self, sampling: Sampling, asked: Iterable[Asked], pipe: Callable[[], Any], batch: int
    ) -> int:
        """Draw what is missing.

        Args:
            pipe: opens the pipeline; it is called where something is missing.

        Returns:
            How many pictures were drawn.

        Raises:
            InputError: the model draws NaN; the disk is too small.
        """
        missing = self.missing(sampling, asked)
        if not missing:
            return 0
        pixels = sum(size[0] * size[1] for size in (size_of(sampling, a) for a in missing.values()))
        need_disk(self.folder, pixels * PNG, "the pictures")
        self._say_model()
        opened, dtype = pipe(), getattr(torch, sampling.dtype)
        groups = _alike(sampling, missing)
        beside = {(w, h): _beside(opened, w, h) for _, w, h in groups}  # the VAE is in float32
        ready = drawing.ready(opened, dtype, scheduler(sampling.sampler, opened))
        for (guidance, width, height), files in groups.items():
            of = [missing[file] for file in files]

            def start(i: int, of: Any = of, size: Any = (width, height)) -> Tensor:
                return noise(ready, of[i], size, sampling.noise).to(ready.device, dtype)

            drawn = drawing.draw(
                ready, [a.prompt for a in of], [a.seed for a in of], batch=batch,
                noise=start,
                num_inference_steps=sampling.steps, guidance_scale=guidance, height=height,
                width=width, **beside[width, height],
            )  # fmt: skip
            for file, one, x in zip(files, of, drawn, strict=True):
                made = json.dumps(made_of(sampling, one), ensure_ascii=False)
                narrow = sampling.dtype == "float16"
                remedy = ", or float16 is too small for it: --change dtype=float32" * narrow
                drawing.save(x, file, self.whose, remedy, {"made of": made})
        return len(missing)

    def _say_model(self) -> None:
        """Beside the pictures: the names of the folder's key."""
        with replacing(self.folder / "model.json") as work:
            work.write_text(json.dumps(self.model, indent=1))


def _beside(pipe: Any, width: int, height: int) -> dict[str, Any]:
    """What a call needs beside a prompt."""
    found = named(type(pipe).__name__).drawing(pipe, width)
    if found and width != height:
        raise InputError(
            f"the list asks for pictures of {width}x{height} pixels, and a {type(pipe).__name__} "
            "draws squares here: give --change size=512"
        )
    return found


def made_of(sampling: Sampling, asked: Asked) -> dict[str, Any]:
    """All that a picture comes from beside the model."""
    width, height = size_of(sampling, asked)
    return {
        "prompt": asked.prompt, "seed": asked.seed, "nth": asked.nth,
        "guidance": guidance_of(sampling, asked), "width": width, "height": height,
        "sampler": sampling.sampler, "steps": sampling.steps, "noise": sampling.noise,
        "dtype": sampling.dtype,
    }  # fmt: skip


def guidance_of(sampling: Sampling, asked: Asked) -> float:
    """The protocol's, or the row's; 7.5 where neither says."""
    own = asked.guidance if sampling.guidance is None else sampling.guidance
    return 7.5 if own is None else float(own)


def size_of(sampling: Sampling, asked: Asked) -> tuple[int, int]:
    """(width, height): the protocol's, or the row's, cut to multiples of 8; 512 where neither
    says."""
    if sampling.size is not None:
        return sampling.size, sampling.size
    width, height = ((side or 512) // 8 * 8 for side in (asked.width, asked.height))
    return width, height


def _alike(
    sampling: Sampling, missing: Mapping[Path, Asked]
) -> dict[tuple[float, int, int], list[Path]]:
    """What one call of the pipeline may draw."""
    found: dict[tuple[float, int, int], list[Path]] = {}
    for file, one in missing.items():
        alike = guidance_of(sampling, one), *size_of(sampling, one)
        found.setdefault(alike, []).append(file)
    return found


def read(file: Path, saved: str) -> Tensor:
    """(3, H, W) uint8 as the judge of published code sees it: "jpeg" is what PIL makes of a
    picture that is saved as JPEG without more being said."""
    if saved == "png":
        return pixels_of(read_rgb(file))
    kept = io.BytesIO()
    read_rgb(file).save(kept, "JPEG")
    return pixels_of(read_rgb(kept.getvalue()))
