"""The images of one model on disk, each under a key of everything that it depends on.

No image is generated twice: not for another protocol, not for another judge, and not after an
interruption."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import InputError
from ..files import need_disk, replacing
from ..images import pixels_of, read_rgb
from ..manifest import key
from ..text_to_image import drawing, transport
from ..text_to_image.families import named
from .processes import Processes
from .protocol import Asked, Sampling
from .samplers import generator, noise, scheduler

Made = TypeVar("Made")
#: Approximate bytes per pixel of a photograph as PNG.
PNG = 1.6
#: Prefix of the folder of a batch that is being saved.
BATCH = "batch-"


class Pictures:
    """The images of one model.

    Args:
        folder: the folder for the images of all models.
        model: the hashes of the model's parts, see `results.made_of`.
        whose: the model's name in messages.
        adapter: the folder of an SPM adapter, which is scaled for each prompt. The given pipelines
            are then those of the base.
    """

    def __init__(
        self, folder: Path, model: Mapping[str, str], whose: str, adapter: Path | None = None
    ) -> None:
        self.model, self.whose, self.adapter = dict(model), whose, adapter
        if adapter is not None:
            self.model["adapter"] = "scaled for each prompt"
        self.folder = folder / key(self.model)

    def file(self, sampling: Sampling, asked: Asked) -> Path:
        return self.folder / f"{key(made_of(sampling, asked))}.png"

    def missing(self, sampling: Sampling, asked: Iterable[Asked]) -> dict[Path, Asked]:
        """File -> image, for the images that do not exist yet, without duplicates."""
        each = {self.file(sampling, one): one for one in asked}
        return {file: one for file, one in each.items() if not file.is_file()}

    def draw(
        self,
        sampling: Sampling,
        asked: Iterable[Asked],
        pipe: Callable[[], Any],
        batch: int,
        processes: Processes | None = None,
    ) -> int:
        """Generate the missing images. Each process generates a part of the batches.

        The batches depend only on `asked` and `batch`, and a batch is saved completely or not at
        all. With another number of processes, or after an interruption, the calls of the pipeline
        are therefore the same, and so are the images.

        Args:
            pipe: opens the pipeline; called only if an image is missing.

        Returns:
            The number of images that were missing.

        Raises:
            InputError: the model generates NaN, or the disk is too full.
        """
        ours, asked = processes or Processes(), list(asked)
        if ours.rank == 0:
            self._finish()
        ours.wait()
        missing = self.missing(sampling, asked)
        batches = self._batches(sampling, asked, missing, batch)
        mine = batches[ours.rank :: ours.number]
        ours.wait()  # all processes have seen the same files
        if mine:
            pixels = sum(w * h for w, h in (size_of(sampling, a) for a in missing.values()))
            need_disk(self.folder, pixels * PNG, "the images")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._draw(sampling, mine, pipe())
        if missing and ours.rank == 0:
            self._say_model()
        ours.wait()
        return len(missing)

    def _batches(
        self, sampling: Sampling, asked: Iterable[Asked], missing: Mapping[Path, Asked], size: int
    ) -> list[dict[Path, Asked]]:
        """The missing images, grouped by the call of the pipeline that generates them."""
        groups: dict[Any, dict[Path, Asked]] = {}
        for one in asked:
            alike = guidance_of(sampling, one), size_of(sampling, one)
            group = groups.setdefault((*alike, self.adapter and one.prompt), {})
            group[self.file(sampling, one)] = one
        parts = (
            list(group.items())[i : i + size]
            for group in groups.values()
            for i in range(0, len(group), size)
        )
        left = ({file: one for file, one in part if file in missing} for part in parts)
        return [part for part in left if part]

    def _draw(self, sampling: Sampling, batches: list[dict[Path, Asked]], opened: Any) -> None:
        sizes = dict.fromkeys(size_of(sampling, a) for part in batches for a in part.values())
        beside = {size: _beside(opened, *size) for size in sizes}  # while the VAE is in float32
        sampler, dtype = scheduler(sampling.sampler, opened), getattr(torch, sampling.dtype)
        family, erased, strength = named(type(opened).__name__), [], {}
        if self.adapter is not None:
            ready = drawing.ready(opened, torch.float32, sampler)
            erased = transport.load(ready, [self.adapter])
            prompts = dict.fromkeys(a.prompt for part in batches for a in part.values())
            strength = {p: transport.strengths(ready, erased, p) for p in prompts}
        ready = drawing.ready(opened, dtype, sampler)
        kept: Future[None] | None = None
        with ThreadPoolExecutor(1) as beside_drawing:  # writes files during the next batch
            for part in tqdm(batches, f"generating, {len(next(iter(batches)))} at a time"):
                of = list(part.values())
                if erased:
                    ready.set_adapters([e.name for e in erased], strength[of[0].prompt])
                size = size_of(sampling, of[0])
                drawn = drawing.together(
                    ready,
                    [a.prompt for a in of],
                    **_noise(ready, sampling, of, size),
                    num_inference_steps=sampling.steps,
                    width=size[0],
                    height=size[1],
                    **family.guiding(guidance_of(sampling, of[0])),
                    **beside[size],
                )
                if kept is not None:
                    kept.result()
                kept = beside_drawing.submit(self._keep, sampling, part, drawn)
            if kept is not None:
                kept.result()
        if erased:  # the pipeline may be used again
            opened.unload_lora_weights()

    def _keep(self, sampling: Sampling, part: Mapping[Path, Asked], drawn: Tensor) -> None:
        """Save a batch completely: its files are moved to their places once all are written."""
        narrow = sampling.dtype == "float16"
        remedy = ", or float16 overflows: give --change dtype=float32" * narrow
        name = key([file.name for file in part])
        work, whole = (self.folder / f"{dot}{BATCH}{name}" for dot in (".", ""))
        shutil.rmtree(work, ignore_errors=True)
        for (file, one), x in zip(part.items(), drawn, strict=True):
            made = json.dumps(made_of(sampling, one), ensure_ascii=False)
            drawing.save(x, work / file.name, self.whose, remedy, {"made of": made})
        work.rename(whole)
        self._place(whole)

    def _finish(self) -> None:
        """Clean up after an interrupted run: place complete batches, and remove incomplete ones."""
        for work in self.folder.glob(f".{BATCH}*"):
            shutil.rmtree(work, ignore_errors=True)
        for whole in self.folder.glob(f"{BATCH}*"):
            self._place(whole)

    def _place(self, whole: Path) -> None:
        for file in whole.glob("*.png"):
            file.replace(self.folder / file.name)
        whole.rmdir()

    def _say_model(self) -> None:
        """Write the content of the folder's key next to the images."""
        with replacing(self.folder / "model.json") as work:
            work.write_text(json.dumps(self.model, indent=1))


def _noise(
    pipe: Any, sampling: Sampling, asked: Sequence[Asked], size: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of `drawing.together` from which the noise of the images comes."""
    if sampling.sampler == "flow":
        return {"seeds": [generator(pipe, a, size, sampling.noise) for a in asked]}
    start = torch.cat([noise(pipe, a, size, sampling.noise) for a in asked])
    dtype = getattr(torch, sampling.dtype)
    return {"seeds": [a.seed for a in asked], "latents": start.to(pipe.device, dtype)}


def _beside(pipe: Any, width: int, height: int) -> dict[str, Any]:
    """Further arguments that a call of the pipeline needs."""
    found = named(type(pipe).__name__).drawing(pipe, width)
    if found and width != height:
        raise InputError(
            f"the list asks for images of {width}x{height} pixels, and a {type(pipe).__name__} "
            "generates only square ones here: give --change size=512"
        )
    return found


def made_of(sampling: Sampling, asked: Asked) -> dict[str, Any]:
    """Everything that an image depends on, except for the model."""
    width, height = size_of(sampling, asked)
    return {
        "prompt": asked.prompt,
        "seed": asked.seed,
        "nth": asked.nth,
        "guidance": guidance_of(sampling, asked),
        "width": width,
        "height": height,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "noise": sampling.noise,
        "dtype": sampling.dtype,
    }


def guidance_of(sampling: Sampling, asked: Asked) -> float:
    """The guidance scale: the protocol's, else the row's, else 7.5."""
    own = asked.guidance if sampling.guidance is None else sampling.guidance
    return 7.5 if own is None else float(own)


def size_of(sampling: Sampling, asked: Asked) -> tuple[int, int]:
    """(width, height): the protocol's, else the row's rounded down to multiples of 8, else 512."""
    if sampling.size is not None:
        return sampling.size, sampling.size
    width, height = ((side or 512) // 8 * 8 for side in (asked.width, asked.height))
    return width, height


def read(file: Path, saved: str) -> Tensor:
    """An image (3, H, W) uint8 as the judge in the published code sees it.

    Args:
        saved: "jpeg" applies PIL's JPEG compression with its defaults; "png" changes nothing.

    Raises:
        InputError: the file is damaged.
    """
    try:
        picture = read_rgb(file)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the image {file} cannot be read ({error}): delete it to generate it again"
        ) from error
    if saved == "png":
        return pixels_of(picture)
    return pixels_of(as_jpeg(picture))


def as_jpeg(picture: Any) -> Any:
    """A PIL image after PIL's JPEG compression with its defaults."""
    kept = io.BytesIO()
    picture.save(kept, "JPEG")
    return read_rgb(kept.getvalue())


def ahead(read: Callable[[int], Made], numbers: Sequence[int]) -> Iterator[Made]:
    """Yield `read` of each number; the next one is read while one is used."""
    with ThreadPoolExecutor(1) as beside:
        waiting = None
        for i in numbers:
            coming = beside.submit(read, i)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
