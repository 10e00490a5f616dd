"""The architecture of a checkpoint's parts, from the shipped configurations or from a folder."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from .header import read
from .looking import FIRST, TRANSFORMERS, Checkpoint

PREDICTIONS = ("epsilon", "v_prediction")
MODELS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")

#: The standard deviation of this tensor is above 0.09 in SD 2.x with v-prediction, and below with
#: epsilon-prediction. ComfyUI distinguishes them by it, too (comfy/supported_models.py, SD20).
TELLING = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


class Architecture(NamedTuple):
    """The configurations of a checkpoint's parts.

    Attributes:
        configs: name of a part, or "model_index" -> its configuration.
        folder: the diffusers folder with the configurations; None: the shipped ones.
        prediction: what the UNet predicts, "epsilon" or "v_prediction".
        told_by: how the prediction was determined.
    """

    configs: dict[str, dict[str, Any]]
    folder: Path | None
    prediction: str
    told_by: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in MODELS if part in self.configs)

    def kind(self, part: str) -> Any:
        """The class of a part; for "model_index" that of the pipeline."""
        import diffusers
        import transformers

        index = self.configs["model_index"]
        if part == "model_index":
            return getattr(diffusers, index["_class_name"])
        library, name = index[part]
        return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)

    def empty(self, part: str) -> nn.Module:
        """The part with parameters on the meta device."""
        from accelerate import init_empty_weights

        kind, config = self.kind(part), self.configs[part]
        with init_empty_weights():
            if part.startswith("text_encoder"):
                return kind(kind.config_class(**config)).eval()
            return kind.from_config(config).eval()

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the part's tensors, by diffusers' names."""
        return {n: tuple(t.shape) for n, t in self.empty(part).state_dict().items()}


def architecture(
    checkpoint: Checkpoint,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
) -> Architecture:
    """Determine the architecture of a checkpoint.

    Args:
        config: a diffusers folder, with or without weights, for sizes that no release has.
        prediction_type: "epsilon" or "v_prediction". None uses the first of these that exists:
            the scheduler of `config`; the file's own mark (``v_pred``,
            ``modelspec.prediction_type``); for SD 2.x the training step that diffusers checks
            (875000: epsilon), then a statistic of a weight, as ComfyUI does, then v_prediction;
            for all others epsilon.

    Raises:
        InputError: `config` is not a diffusers folder of the same family, or `prediction_type` has
            another value.
    """
    if prediction_type not in (None, *PREDICTIONS):
        raise InputError(
            f"prediction_type must be {' or '.join(PREDICTIONS)}; got {prediction_type!r}"
        )
    folder = None if config is None else Path(config)
    if checkpoint.family in TRANSFORMERS:
        return of_transformer(checkpoint, folder, prediction_type)
    configs = shipped(checkpoint.family) if folder is None else from_folder(folder)
    said = None if folder is None else configs["scheduler"].get("prediction_type", "epsilon")
    prediction, by = (prediction_type, "prediction_type") if prediction_type else _told(checkpoint)
    if said and not prediction_type:
        prediction, by = said, f"the scheduler of {folder}"
    changes = [configs.pop("inpainting", {}) if checkpoint.inpainting else {}]
    if prediction == "epsilon":
        changes += [configs.pop("epsilon", {})]
    for name, change in ((name, c[name]) for c in changes for name in c):
        configs[name] |= change
    for left in ("inpainting", "epsilon"):
        configs.pop(left, None)
    configs["scheduler"]["prediction_type"] = prediction
    if "ztsnr" in checkpoint.header.tensors and folder is None:
        configs["scheduler"]["rescale_betas_zero_snr"] = True
    if folder is not None:
        _check(checkpoint, configs, folder)
    return Architecture(configs, folder, prediction, by)


def of_transformer(
    checkpoint: Checkpoint, folder: Path | None, prediction_type: str | None
) -> Architecture:
    """The architecture of a transformer; the other parts stay in the folder.

    Raises:
        InputError: there is no folder, or it is of another pipeline; a prediction type is given.
    """
    title, pipeline = TRANSFORMERS[checkpoint.family][1:]
    if folder is None:
        raise InputError(
            f"{checkpoint.path} holds the transformer of {title}: give config= (--architecture), "
            f"a diffusers folder of the same model ({pipeline}) with the other parts"
        )
    if prediction_type is not None:
        raise InputError(
            f"prediction_type {prediction_type}: {title} predicts velocities: leave it out"
        )
    index = _json(folder, "model_index.json")
    if (found := index.get("_class_name")) != pipeline:
        raise InputError(f"{checkpoint.path} is {title} ({pipeline}), and {folder} is a {found}")
    configs = {"model_index": index, "transformer": _json(folder, "transformer/config.json")}
    return Architecture(configs, folder, "", f"every release of {title}")


def shipped(family: str) -> dict[str, dict[str, Any]]:
    """The public configurations of a family.

    The entries "inpainting" and "epsilon" hold what differs for these models."""
    text = (
        files(__package__)
        .joinpath("configs")
        .joinpath(f"{family}.json")
        .read_text(encoding="utf-8")
    )
    return json.loads(text)


def from_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations of a diffusers folder.

    Raises:
        InputError: a file is missing or damaged.
    """
    found = {"model_index": _json(folder, "model_index.json")}
    for part in (*MODELS, "scheduler"):
        entry = found["model_index"].get(part)
        if isinstance(entry, list) and entry[-1] is not None:
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            found[part] = _json(folder, f"{part}/{file}")
    missing = [p for p in ("unet", "vae", "text_encoder", "scheduler") if p not in found]
    if missing:
        raise InputError(
            f"{folder}: its model_index.json has no {missing[0]}: give a folder of Stable "
            "Diffusion 1.x, 2.x or SDXL"
        )
    return found


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {name}: give a diffusers folder; it needs no weights"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} cannot be read ({error})") from error


def _check(checkpoint: Checkpoint, configs: dict[str, Any], folder: Path) -> None:
    theirs = "sdxl" if "text_encoder_2" in configs else "sd"
    if not checkpoint.family.startswith(theirs) or (theirs == "sd") != (
        checkpoint.family in ("sd1", "sd2")
    ):
        kind = configs["model_index"].get("_class_name")
        raise InputError(f"{checkpoint.path} is {checkpoint.title}, and {folder} is a {kind}")
    prefix, channels = checkpoint.parts["unet"], configs["unet"].get("in_channels", 4)
    ours = checkpoint.header.tensors[prefix + FIRST].shape[1]
    if ours != channels:
        raise InputError(
            f"{checkpoint.path}: its UNet takes {ours} channels, that of {folder} {channels}: give "
            "the folder of the same model"
        )


def _told(checkpoint: Checkpoint) -> tuple[str, str]:
    header, family = checkpoint.header, checkpoint.family
    if "v_pred" in header.tensors:
        return "v_prediction", "the file's v_pred"
    said = header.metadata.get("modelspec.prediction_type", "")
    if said in ("v", "v_prediction", "epsilon"):
        return "epsilon" if said == "epsilon" else "v_prediction", "the file's modelspec"
    if family != "sd2" or checkpoint.inpainting:
        return "epsilon", f"every release of {checkpoint.title}"
    with checkpoint.path.open("rb") as file:
        step = header.tensors.get("global_step")
        if step is not None and read(file, step).flatten()[:1].tolist() == [875000]:
            return "epsilon", "global_step is 875000"
        telling = header.tensors.get(checkpoint.parts["unet"] + TELLING)
        if telling is None:
            return "v_prediction", "nothing in the file says otherwise"
        spread = float(torch.std(read(file, telling).float(), unbiased=False))
    return (
        "v_prediction" if spread > 0.09 else "epsilon",
        f"the standard deviation of {TELLING} is {spread:.3f} (v_prediction: above 0.09)",
    )
