"""Open a single file as a diffusers pipeline, or part by part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from . import lora as loras
from .architecture import Architecture, architecture
from .header import read, read_header
from .looking import PREFIXES, TRANSFORMERS, Checkpoint, look
from .names import Rows, table
from .tokens import END, tokenizer

PathLike = str | os.PathLike[str]


class Single:
    """A checkpoint in one file, whose parts are built on request.

    It needs no network.

    Attributes:
        checkpoint: what the file holds.
        architecture: the architecture of its parts, with the prediction type.
        alone: whether only the transformer comes from the file, and the other parts from `config`.

    Raises:
        InputError: see `look` and `architecture`; `vae` is given for a transformer, or is not a
            VAE.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        config: PathLike | None = None,
        prediction_type: str | None = None,
        vae: PathLike | None = None,
    ) -> None:
        self.checkpoint = look(path)
        self.architecture = architecture(self.checkpoint, config, prediction_type)
        self.sources = dict.fromkeys(self.architecture.parts, self.checkpoint)
        self.alone = self.checkpoint.family in TRANSFORMERS
        if vae is not None and self.alone:
            raise InputError(
                f"vae {vae}: the VAE of {self.checkpoint.title} comes from config=; leave it out"
            )
        if vae is not None:
            self.sources["vae"] = _vae_file(vae, self.checkpoint.family)
        self._tables: dict[str, dict[str, Rows]] = {}

    def check(self, lora: PathLike | None = None) -> None:
        """Check the file from its header, before a weight is read.

        Args:
            lora: a LoRA to add, which is checked too.

        Raises:
            InputError: the file lacks a part or some of its tensors, or has others; the LoRA
                belongs to another model.
        """
        made = self.architecture
        for part in made.parts:
            self.table(part)
        if lora is not None and self.alone:
            raise InputError(
                f"lora {lora} is not supported for {self.checkpoint.title} in one file: give the "
                "folder of a pipeline into which the LoRA is merged"
            )
        if lora is not None:
            empty: dict[str, Any] = {part: made.empty(part) for part in made.parts}
            words = [p.replace("text_encoder", "tokenizer") for p in empty if "text_encoder" in p]
            empty |= {**dict.fromkeys(words), "scheduler": self.scheduler(), **_rest(made)}
            loras.check(made.kind("model_index")(**empty), lora)

    def table(self, part: str) -> dict[str, Rows]:
        """diffusers' names of the part's tensors -> their places in the file."""
        if part not in self._tables:
            self._tables[part] = table(self.sources[part], part, self.architecture)
        return self._tables[part]

    def own_table(self, part: str) -> dict[str, Rows]:
        """Like `table`, but always of the checkpoint, even if the VAE comes from another file."""
        if self.sources[part] is self.checkpoint:
            return self.table(part)
        return table(self.checkpoint, part, self.architecture)

    def part(self, part: str) -> Any:
        """The model of a part ("unet", "vae", "text_encoder", ...) in float32 on the CPU, in eval
        mode.

        Raises:
            InputError: `part` is unknown.
        """
        if part not in self.architecture.parts:
            raise InputError(
                f"part must be one of {', '.join(self.architecture.parts)}; got {part!r}"
            )
        model = self.architecture.empty(part)
        model.load_state_dict(self.tensors(part, model), strict=True, assign=True)
        return model

    def tensors(self, part: str, model: nn.Module) -> dict[str, Tensor]:
        """The part's tensors in float32 on the CPU, with the shapes of `model`."""
        header, shapes = self.sources[part].header, model.state_dict()
        found = {}
        with header.path.open("rb") as file:
            for name, at in self.table(part).items():
                t = read(file, header.tensors[at.key], (at.first, at.last))
                found[name] = at.turned(t).reshape(shapes[name].shape).float().contiguous()
        return found

    def tokenizer(self, part: str = "tokenizer") -> Any:
        made = self.architecture
        pad = made.configs.get(part, {}).get("pad_token", END)
        found = tokenizer(made.folder, part=part, pad_token=pad)
        config = made.configs[part.replace("tokenizer", "text_encoder")]
        if len(found) > config["vocab_size"]:
            raise InputError(
                f"the tokenizer has {len(found)} tokens, the text encoder of "
                f"{self.checkpoint.path} {config['vocab_size']}: give config= "
                "(--architecture), a folder with the model's own tokenizer"
            )
        return found

    def scheduler(self) -> Any:
        return self.architecture.kind("scheduler").from_config(
            self.architecture.configs["scheduler"]
        )

    def pipeline(self, *, lora: PathLike | None = None, lora_scale: float = 1.0) -> Any:
        """The whole pipeline in float32 on the CPU; see `open_single`."""
        made = self.architecture
        self.check()
        parts = {part: self.part(part) for part in made.parts}
        for part in made.parts:
            if part.startswith("text_encoder"):
                name = part.replace("text_encoder", "tokenizer")
                parts[name] = self.tokenizer(name)
        parts["scheduler"] = self.scheduler()
        pipe = made.kind("model_index")(**parts, **_rest(made))
        if lora is not None:
            loras.fuse(pipe, lora, lora_scale)
        return pipe


def open_single(
    path: PathLike,
    *,
    config: PathLike | None = None,
    prediction_type: str | None = None,
    vae: PathLike | None = None,
    lora: PathLike | None = None,
    lora_scale: float = 1.0,
) -> Any:
    """Open a file in the layout of ComfyUI, A1111 and kohya as a pipeline in float32 on the CPU.

    Args:
        config: see `architecture`; its tokenizers are used, too.
        prediction_type: see `architecture`.
        vae: the file of another VAE, in either layout.
        lora: a LoRA to add to the weights, multiplied by `lora_scale`.

    Raises:
        InputError: see `Single` and `Single.check`.
    """
    single = Single(path, config=config, prediction_type=prediction_type, vae=vae)
    return single.pipeline(lora=lora, lora_scale=lora_scale)


def _rest(made: Architecture) -> dict[str, Any]:
    """Further arguments of the pipeline's class."""
    if "text_encoder_2" in made.configs:
        empty = made.configs["model_index"].get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": empty, "add_watermarker": False}
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def _vae_file(path: PathLike, family: str) -> Checkpoint:
    header = read_header(path)
    (inside,) = PREFIXES[family]["vae"]
    names = header.tensors
    prefix = inside if any(k.startswith(inside) for k in names) else ""
    if f"{prefix}decoder.conv_in.weight" not in names:
        raise InputError(f"{Path(path)} has no VAE of Stable Diffusion: give the file of a VAE")
    return Checkpoint(header, family, False, {"vae": prefix}, (), 0)
