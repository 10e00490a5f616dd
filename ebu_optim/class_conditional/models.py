"""The models of this folder: the paper's UNet and a small one, classifiers, and their folders.

A model's folder holds `unet` (the trained weights), `unet_ema` (their moving average, if there is
one) and `scheduler`, each in diffusers' format, `classes.json` and a model card:

    UNet2DModel.from_pretrained(folder, subfolder="unet")
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..diffusion.schedules import prediction_type
from ..errors import InputError
from ..files import replacing_folder
from ..modules import whole_model

Weights = Literal["trained", "ema"]
WEIGHTS = {"trained": "unet", "ema": "unet_ema"}


def new_scheduler() -> DDPMScheduler:
    """Return DDPM's scheduler: linear beta 1e-4 to 2e-2, 1000 steps, epsilon, no clipping."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
    )


def new_unet(kind: str, size: int, channels: int, classes: int) -> UNet2DModel:
    """Return a class-conditional UNet whose last condition, number `classes`, is the null class.

    "paper": 128 channels times 1, 2, 2, 2 (with 4 from 64x64 on), two blocks per level, one
    attention head at 16x16, dropout 0.1: 35.8 M parameters at 32x32. The class embedding is one
    table that is added to the time embedding; the original has two linear layers between them.
    "small": 0.4 to 1.1 M parameters.
    """
    if kind == "paper":
        widths = [128, 256, 256, 256] + ([512] if size >= 64 else [])
        options = {
            "layers_per_block": 2,
            "dropout": 0.1,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "attention_head_dim": None,
        }
        attention = [size // 2**i == 16 for i in range(len(widths))]
    else:
        widths = [24, 48] if size < 16 else [32, 64, 64]
        # with 32 groups, each group would be one channel, and the class signal would cancel
        options = {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16}
        attention = [i == len(widths) - 1 for i in range(len(widths))]
    if size % 2 ** (len(widths) - 1):
        raise InputError(
            f"--model {kind} halves the image {len(widths) - 1} times, which {size}x{size} does "
            f"not allow; give --resolution, a multiple of {2 ** (len(widths) - 1)}"
        )
    down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        down_block_types=down,
        up_block_types=up,
        num_class_embeds=classes + 1,
        **options,
    )


def save_unet(
    folder: Path,
    model: UNet2DModel,
    scheduler: Any,
    info: Mapping[str, Any],
    card: str,
    ema: Any = None,
) -> None:
    """Write a model's folder, each part completely or not at all; `ema` is an EMAModel."""
    with replacing_folder(folder / "unet") as work:
        model.save_pretrained(work)
    if ema is not None:
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        with replacing_folder(folder / "unet_ema") as work:
            model.save_pretrained(work)
        ema.restore(model.parameters())
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "classes.json").write_text(json.dumps(dict(info), indent=1))
    (folder / "README.md").write_text(card)


def fetch(name: str) -> Path:
    """Return a model's folder: the given one, or one that is downloaded from the hub."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    except Exception as error:  # the hub's client raises many types
        raise InputError(
            f"{name} is not a folder here, and the hub does not provide it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); give the path of a model"
        ) from error


def load_unet(name: str, weights: str = "trained") -> tuple[UNet2DModel, DDPMScheduler, dict]:
    """Return the model in float32 and eval mode, its scheduler, and the content of classes.json.

    Raises:
        InputError: the folder holds no model of train.py, or its parts do not fit.
    """
    folder = fetch(name)
    part = folder / WEIGHTS[weights]
    for needed in (part / "config.json", folder / "classes.json"):
        if not needed.is_file():
            hint = " (it was trained without --use_ema)" if weights == "ema" else ""
            raise InputError(f"{folder} is not a model of train.py: {needed} is missing{hint}")
    info = json.loads((folder / "classes.json").read_text())
    scheduler = load_scheduler(folder)
    model = whole_model(UNet2DModel, part, torch_dtype=torch.float32)
    if model.config.num_class_embeds != len(info["classes"]) + 1:
        raise InputError(
            f"{folder}: the model has {model.config.num_class_embeds} conditions, but classes.json "
            f"names {len(info['classes'])} classes and a null class"
        )
    return model, scheduler, info


def load_scheduler(folder: Path) -> DDPMScheduler:
    """Return the scheduler in a model's folder.

    Raises:
        InputError: the scheduler is missing or not of DDPM's family.
    """
    try:
        config = DDPMScheduler.load_config(folder, subfolder="scheduler")
        prediction_type(config)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {error}") from error
    return DDPMScheduler.from_config(config)


def start_of_average(name: str, model: nn.Module) -> list[Tensor]:
    """Return the weights at which the average of an unlearned model starts.

    They are the base's own average if it has one, as in the DDPM code base, else `model`'s weights.
    """
    try:
        other, _, _ = load_unet(name, "ema")
    except InputError:
        other = model
    return [p.detach().clone() for p in other.parameters()]


class Classifier(nn.Module):
    """Images (n, C, H, W) in [-1, 1] -> logits (n, classes).

    "resnet34": torchvision's, on images enlarged to 224x224 (the usual normalisation, mean and
    deviation 0.5, is already the range [-1, 1]); one channel is repeated three times. "small": a
    CNN of three layers, which is wider and has batch norm from 16x16 on. "medium": two such layers
    at each size, for images of 16x16 and more.
    """

    def __init__(self, kind: str, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "resnet34":
            try:
                from torchvision.models import resnet34
            except ImportError as error:
                raise InputError(
                    f'resnet34 needs torchvision ({error}); pip install "ebu_optim[data]"'
                ) from error
            self.body = resnet34()
            self.body.fc = nn.Identity()
            self.head = nn.Linear(512, classes)
            nn.init.xavier_uniform_(self.head.weight)
            return
        wide = shape[1] >= 16
        if kind == "medium" and not wide:
            raise InputError(
                f"--model medium is for images of 16x16 and more; got {shape[1]}x{shape[2]}: give "
                "--model small"
            )
        widths = (shape[0], 64, 128, 256) if wide else (shape[0], 32, 64, 64)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if wide else [])]
            if kind == "medium":
                layers += [nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b)]
            layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if i or wide else [])]
        side = 4 if wide else shape[1] // 4
        self.body = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(widths[-1] * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "resnet34":
            x = x.expand(-1, 3, -1, -1)
            x = nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        return self.head(self.body(x))


def save_classifier(folder: Path, model: Classifier, info: Mapping[str, Any]) -> None:
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "classifier.json").write_text(json.dumps(dict(info), indent=1))


def load_classifier(folder: Path, classes: Iterable[str]) -> tuple[Classifier, dict]:
    """Return a classifier in eval mode and its information.

    Raises:
        InputError: the folder holds no classifier, or its classes are not the model's.
    """
    try:
        info = json.loads((folder / "classifier.json").read_text())
        state = load_file(folder / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a classifier of train_classifier.py: {error}") from error
    ours = list(classes)
    if info["classes"] != ours:
        raise InputError(
            f"{folder} was trained on other classes: {', '.join(info['classes'][:5])}, ... "
            f"({len(info['classes'])}); the model has {', '.join(ours[:5])}, ... ({len(ours)})"
        )
    model = Classifier(info["kind"], info["shape"], len(ours) + info["reject"])
    model.load_state_dict(state)
    return model.eval(), info
