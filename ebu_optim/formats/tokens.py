"""CLIP's tokenizer. Checkpoints in one file do not contain its vocabulary."""

from __future__ import annotations

import gzip
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError

HUB = "openai/clip-vit-large-patch14"
SIZE = 49408  # size of CLIP's vocabulary, the same in all these models
END = "<|endoftext|>"


def tokenizer(folder: Path | None = None, *, part: str = "tokenizer", pad_token: str = END) -> Any:
    """CLIP's tokenizer, from the first of these that exists: the folder; the cache of
    transformers; the package open_clip.

    Args:
        folder: a diffusers folder with a subfolder `part`.
        pad_token: the padding token without a folder; SD 2.x and SDXL's second encoder pad with
            "!".

    Raises:
        InputError: the folder's tokenizer cannot be read, or none exists.
    """
    from transformers import CLIPTokenizer

    if folder is not None and (folder / part).is_dir():
        try:
            return CLIPTokenizer.from_pretrained(folder / part)
        except Exception as error:  # the tokenizers' library raises many types
            raise InputError(f"{folder / part}: the tokenizer cannot be read: {error}") from error
    try:
        found = CLIPTokenizer.from_pretrained(HUB, local_files_only=True, pad_token=pad_token)
        if len(found) == SIZE:  # without files some versions create a tokenizer of two tokens
            return found
    except Exception:  # noqa: S110 - not in the cache; open_clip has the same vocabulary
        pass
    return from_open_clip(pad_token)


def from_open_clip(pad_token: str = END) -> Any:
    """CLIP's tokenizer from the vocabulary of open_clip.

    Raises:
        InputError: open_clip is not installed.
    """
    from transformers import CLIPTokenizer

    spec = find_spec("open_clip")
    places = spec.submodule_search_locations if spec else None
    file = Path(places[0], "bpe_simple_vocab_16e6.txt.gz") if places else None
    if file is None or not file.is_file():
        raise InputError(
            "CLIP's vocabulary is missing: pip install open_clip_torch, or give config= "
            "(--architecture), a folder with a tokenizer, or get it once with `hf download "
            f"{HUB} vocab.json merges.txt tokenizer.json tokenizer_config.json "
            "special_tokens_map.json`"
        )
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    symbols = list(_bytes().values())
    symbols += [f"{s}</w>" for s in symbols]
    merges = lines[1 : SIZE - len(symbols) - 2 + 1]
    names = [*symbols, *("".join(m.split()) for m in merges), "<|startoftext|>", END]
    with tempfile.TemporaryDirectory() as work:  # transformers 4 takes only files
        vocab, rules = Path(work, "vocab.json"), Path(work, "merges.txt")
        vocab.write_text(json.dumps({n: i for i, n in enumerate(names)}), encoding="utf-8")
        rules.write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        # by position, as the names of these arguments differ between transformers 4 and 5
        return CLIPTokenizer(str(vocab), str(rules), pad_token=pad_token, model_max_length=77)


def _bytes() -> dict[int, str]:
    """CLIP's characters for the 256 bytes: printable ones stay, others become chr(256) and up."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printed]
    return {b: chr(b) for b in printed} | {b: chr(256 + i) for i, b in enumerate(others)}
