"""Unpack a checkpoint in one file into a diffusers folder, which the other modules read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..files import need_disk, replacing_folder, writable
from ..manifest import contents, key
from .architecture import shipped
from .opening import PathLike, Single
from .tokens import tokenizer

#: safetensors' names of the dtypes that a folder keeps; others become float32.
EXACT = {"F16": torch.float16, "BF16": torch.bfloat16}


def cache_folder() -> Path:
    """The folder for what can be made again: EBU_OPTIM_CACHE, or ``ebu_optim`` in the user's
    cache."""
    if given := os.environ.get("EBU_OPTIM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebu_optim"


def unpacked(
    path: PathLike,
    *,
    config: PathLike | None = None,
    prediction_type: str | None = None,
    vae: PathLike | None = None,
    lora: PathLike | None = None,
    weights: bool = True,
) -> Path:
    """The diffusers folder of a checkpoint, made once and kept in `cache_folder`.

    The folder's name is a hash of the contents.

    Args:
        config, prediction_type, vae, lora: see :func:`open_single`.
        weights: False makes only the configurations and the tokenizers, from the file's header.

    Returns:
        The folder. Its weights are in the file's dtype if all are float16 or all are bfloat16 and
        no LoRA is added, else in float32.

    Raises:
        InputError: see :func:`open_single`; the disk is full.
    """
    single = Single(path, config=config, prediction_type=prediction_type, vae=vae)
    single.check(lora)
    made = single.architecture
    given = [Path(p) for p in (path, vae, lora) if p is not None]
    # hashing 7 GB takes seconds, and the configurations depend only on the header
    of = contents(given) if weights else key([(p.name, p.stat().st_size) for p in given])
    of = key(of, str(made.folder.resolve())) if single.alone and made.folder else of
    name = key(of, made.configs, "weights" if weights else sorted(single.checkpoint.header.tensors))
    folder = cache_folder() / "unpacked" / name
    with _alone(folder) as there:
        if not there:
            if weights:
                need_disk(folder.parent, 2.1 * sum(p.stat().st_size for p in given), "the model")
            with replacing_folder(folder) as work:
                _write(single, work, lora, weights)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Yields whether the folder exists, and locks it.

    All processes of a run ask for the same folder at once: the others wait for the first."""
    mark = folder / "model_index.json"
    if mark.is_file():
        yield True
        return
    with writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        with lock:
            yield mark.is_file()


def shipped_folder(family: str) -> Path:
    """The configurations of a family at its real size, and its tokenizers, without weights.

    Args:
        family: a key of `looking.TITLES`.
    """
    configs = shipped(family)
    folder = cache_folder() / "shipped" / key(family, configs)
    with _alone(folder) as there:
        if there:
            return folder
        index = configs["model_index"]
        with replacing_folder(folder) as work:
            for part, config in configs.items():
                if part not in index or part == "_class_name":
                    continue
                (work / part).mkdir()
                if part.startswith("tokenizer"):
                    tokenizer(pad_token=config["pad_token"]).save_pretrained(work / part)
                    continue
                file = "scheduler_config.json" if part == "scheduler" else "config.json"
                (work / part / file).write_text(json.dumps(config), encoding="utf-8")
            (work / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _beside(single: Single, folder: Path) -> None:
    """Link the parts that the file lacks from the given folder."""
    assert single.architecture.folder
    for source in single.architecture.folder.resolve().iterdir():
        if source.is_dir() and source.name != "transformer":
            try:
                (folder / source.name).symlink_to(source, target_is_directory=True)
            except OSError:  # Windows needs a privilege for links
                shutil.copytree(source, folder / source.name)
    index = single.architecture.configs["model_index"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write(single: Single, folder: Path, lora: PathLike | None, weights: bool) -> None:
    made, dtypes = single.architecture, single.checkpoint.dtypes
    dtype = EXACT.get(dtypes[0], torch.float32) if len(dtypes) == 1 and not lora else torch.float32
    pipe = single.pipeline(lora=lora) if lora and weights else None
    kept = {"_class_name", "scheduler", *made.parts}
    for part in made.parts:
        if not weights:
            model: Any = made.empty(part)
            # the configuration of a transformers model is an object
            config = model.config if part.startswith("text_encoder") else None
            config.save_pretrained(folder / part) if config else model.save_config(folder / part)
        else:
            model = getattr(pipe, part) if pipe else single.part(part)
            # a VAE from another file may have another dtype
            own = single.sources[part] is single.checkpoint
            torch.nn.Module.to(model, dtype if own else torch.float32)
            model.save_pretrained(folder / part)
        if single.alone:
            _beside(single, folder)
            return
        del model  # frees the memory for the next part
        if part.startswith("text_encoder"):
            words = part.replace("text_encoder", "tokenizer")
            single.tokenizer(words).save_pretrained(folder / words)
            kept.add(words)
    single.scheduler().save_pretrained(folder / "scheduler")
    index = {
        n: v if n in kept or not isinstance(v, list) else [None, None]
        for n, v in made.configs["model_index"].items()
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
