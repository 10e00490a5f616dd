"""A single file as a pipeline of diffusers, or part by part."""

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
    """A checkpoint in one file, its parts built when they are asked for.

    Nothing is asked of a network.

    Attributes:
        checkpoint: what the file is.
        architecture: of its parts, with the prediction and how it was told.
        alone: the transformer is taken without the other parts, which are config='s.

    Raises:
        InputError: what `look` and `architecture` refuse; a part that the file lacks, lacks tensors
            of, or has too many or other ones of: all seen from headers, before a weight is read.
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
            raise InputError(f"vae {vae}: of {self.checkpoint.title} it is config='s")
        if vae is not None:
            self.sources["vae"] = _vae_file(vae, self.checkpoint.family)
        self._tables: dict[str, dict[str, Rows]] = {}

    def check(self, lora: PathLike | None = None) -> None:
        """Args:
            lora: which is to be added.

        Raises:
            InputError: a part of the pipeline is not in the file as it must be; a LoRA of another
                model.
        """
        made = self.architecture
        for part in made.parts:
            self.table(part)
        if lora is not None and self.alone:
            raise InputError(
                f"lora {lora}: not with a {self.checkpoint.title} in one file: give the "
                "folder of a pipeline that it is merged into"
            )
        if lora is not None:
            empty: dict[str, Any] = {part: made.empty(part) for part in made.parts}
            words = [p.replace("text_encoder", "tokenizer") for p in empty if "text_encoder" in p]
            empty |= {**dict.fromkeys(words), "scheduler": self.scheduler(), **_rest(made)}
            loras.check(made.kind("model_index")(**empty), lora)

    def table(self, part: str) -> dict[str, Rows]:
        """diffusers' names of the part's tensors -> where they are in the file."""
        if part not in self._tables:
            self._tables[part] = table(self.sources[part], part, self.architecture)
        return self._tables[part]

    def own_table(self, part: str) -> dict[str, Rows]:
        """As `table`, of the checkpoint itself, also where the VAE comes from another file."""
        if self.sources[part] is self.checkpoint:
            return self.table(part)
        return table(self.checkpoint, part, self.architecture)

    def part(self, part: str) -> Any:
        """One of "unet", "vae", "text_encoder", "text_encoder_2": float32, CPU, eval mode."""
        if part not in self.architecture.parts:
            raise InputError(f"part must be one of {', '.join(self.architecture.parts)}: {part!r}")
        model = self.architecture.empty(part)
        model.load_state_dict(self.tensors(part, model), strict=True, assign=True)
        return model

    def tensors(self, part: str, model: nn.Module) -> dict[str, Tensor]:
        """In float32, with the shapes of the model's."""
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
                f"{self.checkpoint.path} {config['vocab_size']}: give config=, a folder with the "
                "model's own tokenizer"
            )
        return found

    def scheduler(self) -> Any:
        return self.architecture.kind("scheduler").from_config(
            self.architecture.configs["scheduler"]
        )

    def pipeline(self, *, lora: PathLike | None = None, lora_scale: float = 1.0) -> Any:
        """All of it."""
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
    """A whole pipeline in float32 on the CPU, from a file as ComfyUI, A1111 and kohya have it.

    Args:
        config: see `architecture`; its tokenizers are taken too.
        prediction_type: see `architecture`.
        vae: the file of another VAE, in either layout.
        lora: a LoRA that is added to the weights, `lora_scale` times.

    Raises:
        InputError: see `Single`; a LoRA of another model.
    """
    single = Single(path, config=config, prediction_type=prediction_type, vae=vae)
    return single.pipeline(lora=lora, lora_scale=lora_scale)


def _rest(made: Architecture) -> dict[str, Any]:
    """What pipelines take beside the parts that are here."""
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
        raise InputError(f"{Path(path)} holds no VAE of Stable Diffusion: give the file of one")
    return Checkpoint(header, family, False, {"vae": prefix}, (), 0)
