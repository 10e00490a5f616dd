"""Train the two classifiers that judge the digit and the style of the world's images.

    python examples/stable_diffusion/world/judges.py --output_dir outputs/judges

Each has one more class, "none". For both it contains noise and images with shuffled pixels; for
the content also blank paper, and images with exchanged quarters. The judge of style is trained on
the latter as images of their style, as it must not need a digit. Both are trained on moved,
blurred and noisy images. `outputs/judges` holds content.safetensors and style.safetensors, with
their accuracies on test digits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import training
from ...errors import InputError
from ...files import load_tensors, save_tensors
from ...metrics import accuracy, classify
from ...training.data import noise_images
from ...training.fields import option
from . import loop
from .captions import CONTENTS, STYLES
from .images import SIZE, World, paper, world
from .loop import LoopOptions

NONE = "none"
#: The classes of each judge; the last one means none of the others.
CLASSES = {"content": (*CONTENTS, NONE), "style": (*STYLES, NONE)}


class Judge(nn.Module):
    """Images (n, 3, 32, 32) in [-1, 1] -> logits (n, classes); 0.1 M parameters."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(
            *layers,
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (SIZE // 8) ** 2, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Judges(NamedTuple):
    """Both judges in eval mode.

    Attributes:
        found: the figures that were measured after their training.
    """

    content: nn.Module
    style: nn.Module
    found: dict[str, dict[str, float]]


def load_judges(folder: Path) -> Judges:
    """Load the judges that judges.py saved.

    Raises:
        InputError: a file is missing, damaged, or has other classes than this world.
    """
    loop.need(folder, tuple(f"{name}.safetensors" for name in CLASSES), "judges.py")
    models, found = {}, {}
    for name, classes in CLASSES.items():
        path = folder / f"{name}.safetensors"
        try:
            state, meta = load_tensors(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a judge of judges.py: {error}") from error
        if meta.get("classes") != list(classes):
            raise InputError(
                f"{path} has the classes {meta.get('classes')}, this world has {list(classes)}: "
                "train the judges again"
            )
        models[name] = Judge(len(classes)).eval()
        models[name].load_state_dict(state)
        found[name] = meta["found"]
    return Judges(models["content"], models["style"], found)


class Loss:
    """Cross-entropy of a batch of moved, blurred and noisy images.

    The batch is extended by an eighth of its size for each kind of image in `others`."""

    def __init__(self, name: str, train: World, batch: int, device: torch.device | str) -> None:
        self.train, self.batch, self.device, self.name = train, batch, device, name
        self.labels = train.contents if name == "content" else train.styles

    def __call__(self, model: nn.Module) -> Tensor:
        rows = torch.randint(len(self.labels), (self.batch,))
        x, y = self.train.pictures[rows], self.labels[rows]
        parts = [(x, y), *others(self.name, x, self.train.styles[rows], max(self.batch // 8, 3))]
        x, y = (torch.cat(t) for t in zip(*parts))
        return F.cross_entropy(model(worn(x).to(self.device)), y.to(self.device))


def others(name: str, x: Tensor, styles: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """Images without a digit, n of each kind, with their labels for the judge `name`.

    Args:
        x, styles: images and their styles, from which these images are made.
    """
    none = len(CLASSES[name]) - 1
    g = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    mixed, mixed_styles = exchanged(x[:n]), styles[:n]
    blank = torch.cat([paper(style, 1) for style in STYLES])[styles[-n:]]
    found = [(noise_images(n, g, x), torch.full((n,), none))]
    if name == "style":  # blank paper looks the same in the styles plain, outline and halftone
        return [*found, (mixed, mixed_styles)]
    return [*found, *((part, torch.full((len(part),), none)) for part in (mixed, blank))]


def exchanged(x: Tensor) -> Tensor:
    """Images with exchanged quarters: each moves to the opposite corner."""
    return x.roll((SIZE // 2, SIZE // 2), dims=(2, 3))


def worn(x: Tensor) -> Tensor:
    """Images moved by up to two pixels, blurred by a random amount, and with noise."""
    n, most = len(x), 2
    padded = F.pad(x, (most,) * 4, mode="replicate")
    left = torch.randint(2 * most + 1, (n, 2))
    rows = left[:, 0, None] + torch.arange(SIZE)
    columns = left[:, 1, None] + torch.arange(SIZE)
    index = torch.arange(n)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    moved = moved.permute(0, 3, 1, 2)
    blur = torch.rand(n, 1, 1, 1) * 0.7
    moved = (1 - blur) * moved + blur * F.avg_pool2d(moved, 3, 1, 1, count_include_pad=False)
    return moved + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn(moved.shape)


def measured(name: str, judge: nn.Module, test: World) -> dict[str, float]:
    """Accuracy on test digits in all styles, the worst accuracy over classes, and the accuracy on
    images without a digit."""
    labels = test.contents if name == "content" else test.styles
    logits = classify(judge, test.pictures)
    each = [accuracy(logits[labels == k], labels[labels == k]) for k in labels.unique()]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        rows = torch.randperm(len(labels))[:600]
        more = others(name, test.pictures[rows], test.styles[rows], 300)
    x, y = (torch.cat(t) for t in zip(*more))
    return {
        "accuracy": accuracy(logits, labels),
        "worst_class": min(each),
        "without_digit": accuracy(classify(judge, x), y),
    }


@dataclass(frozen=True, kw_only=True)
class JudgesOptions(LoopOptions):
    """The options of the judges' training."""

    max_train_steps: int = option(600, help="Steps of training of each judge.")
    lr_warmup_steps: int = option(50, help="Steps at the start over which the learning rate rises.")


def train_judges(args: JudgesOptions) -> None:
    """Train both judges, or resume their training, and save them in ``args.output_dir``."""
    accelerator = loop.new_accelerator(args)
    train, test = (world(split, args.max_train_samples) for split in ("train", "test"))
    for name, classes in CLASSES.items():
        judge = Judge(len(classes))
        loop.fit(
            args.stage(name),
            accelerator,
            f"judge_of_{name}",
            judge,
            Loss(name, train, args.train_batch_size, accelerator.device),
            partial(_save, args.output_dir, name, judge, test),
        )


def _save(folder: Path, name: str, judge: nn.Module, test: World, _: object) -> None:
    """Save the judge with its figures."""
    found = measured(name, judge, test)
    state = {k: v.cpu().contiguous() for k, v in judge.state_dict().items()}
    meta = {"classes": list(CLASSES[name]), "found": found}
    save_tensors(folder / f"{name}.safetensors", state, meta)
    print(f"{name}: {json.dumps({k: round(v, 4) for k, v in found.items()})}")


if __name__ == "__main__":
    training.command(train_judges, JudgesOptions, __doc__)
