"""Checkpoints in one file, in the layout of ComfyUI, A1111 and kohya's scripts, and LoRAs.

They are inspected, opened as a diffusers pipeline, and written again."""

from .._extras import require

require("transformers", "text-to-image")

from .folders import write_folder
from .header import Header, read_header
from .looking import Checkpoint, look
from .lora import fuse, write_lora
from .opening import Single, open_single
from .tokens import tokenizer
from .unpacking import cache_folder, shipped_folder, unpacked
from .writing import write_single

__all__ = [
    "Checkpoint",
    "Header",
    "Single",
    "cache_folder",
    "fuse",
    "look",
    "open_single",
    "read_header",
    "shipped_folder",
    "tokenizer",
    "unpacked",
    "write_folder",
    "write_lora",
    "write_single",
]
