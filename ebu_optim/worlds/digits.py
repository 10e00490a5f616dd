"""The world of the quickstart: real 8x8 digits, a small conditional UNet, two classifiers.

``python examples/quickstart.py --train`` makes everything under ``ASSETS`` again from the data in
scikit-learn (Optical Recognition of Handwritten Digits, UCI; 1,797 images).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import replacing_folder

ASSETS = Path(__file__).parent / "assets" / "digits"
CLASSES = tuple(range(10))
NULL_CLASS = 10
REJECT_CLASS = 10
SHAPE = (1, 8, 8)


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, train labels, test images, test labels; images in [-1, 1], shape (n, 1, 8, 8).

    The split (80 % / 20 %, stratified) is fixed: the shipped models never saw the test images.
    """
    x, y = load_digits(return_X_y=True)
    x = (x.astype(np.float32) / 8.0 - 1.0).reshape(-1, *SHAPE)
    parts = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(p)) for p in parts)
    return x_train, y_train.long(), x_test, y_test.long()


def scheduler() -> DDPMScheduler:
    """The noise schedule of DDPM: linear beta from 1e-4 to 2e-2, 1000 steps, noise prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon"
    )


def new_unet() -> UNet2DModel:
    """A UNet with 0.4 M parameters; class 10 is the null class of classifier-free guidance."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        # with 32 groups each group would be one channel, and the class signal would cancel
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )


class DigitClassifier(nn.Module):
    """A small CNN: (n, 1, 8, 8) images in [-1, 1] -> (n, num_classes) logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def noise(n: int, generator: torch.Generator, digits: Tensor) -> Tensor:
    """Images (n, 1, 8, 8) of the reject class, in three equal parts.

    The parts are uniform noise, Gaussian noise of several widths clamped to [-1, 1], and real
    digits with shuffled pixels."""
    a = b = n // 3
    uniform = torch.rand(a, *SHAPE, generator=generator) * 2 - 1
    width = torch.rand(b, 1, 1, 1, generator=generator) * 0.8 + 0.2
    gaussian = (torch.randn(b, *SHAPE, generator=generator) * width).clamp(-1, 1)
    pick = torch.randint(len(digits), (n - a - b,), generator=generator)
    order = torch.rand(n - a - b, 64, generator=generator).argsort(dim=1)
    shuffled = digits[pick].flatten(1).gather(1, order).view(-1, *SHAPE)
    return torch.cat([uniform, gaussian, shuffled])


def load_unet(device: str | torch.device = "cpu") -> UNet2DModel:
    """The shipped model in float32 (its file holds float16)."""
    return UNet2DModel.from_pretrained(ASSETS / "unet", torch_dtype=torch.float32).to(device)


def load_classifiers(device: str | torch.device = "cpu") -> tuple[nn.Module, nn.Module]:
    """The ten-class classifier and the one with a reject class (index 10), in eval mode."""
    pair = []
    for name, classes in (("classifier", 10), ("classifier_reject", 11)):
        model = DigitClassifier(classes)
        model.load_state_dict(
            {k: v.float() for k, v in load_file(ASSETS / f"{name}.safetensors").items()}
        )
        pair.append(model.to(device).eval())
    return pair[0], pair[1]


def train(folder: Path = ASSETS, steps: int = 4000, epochs: int = 40) -> None:
    """Make the shipped folder again (about 20 minutes). It is replaced only once all is done."""
    with replacing_folder(folder) as work:
        print(train_classifiers(work, epochs=epochs))
        train_unet(work, steps=steps)


def train_classifiers(folder: Path, *, epochs: int, seed: int = 0) -> dict[str, float]:
    """Train both classifiers, save them in float16 and return their test accuracies."""
    x, y, x_test, y_test = images()
    accuracy = {}
    for name, reject in (("classifier", False), ("classifier_reject", True)):
        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(seed)
        model = DigitClassifier(11 if reject else 10).train()
        steps_per_epoch = len(x) // 64
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-3, total_steps=epochs * steps_per_epoch
        )
        for _ in tqdm(range(epochs), desc=name):
            for i in torch.randperm(len(x), generator=g).split(64)[:steps_per_epoch]:
                xb, yb = x[i] + 0.1 * torch.randn(x[i].shape, generator=g), y[i]
                if reject:
                    extra = noise(24, g, x)
                    xb = torch.cat([xb, extra])
                    yb = torch.cat([yb, torch.full((24,), REJECT_CLASS)])
                optimizer.zero_grad()
                F.cross_entropy(model(xb), yb).backward()
                optimizer.step()
                schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy[name] = (model(x_test).argmax(1) == y_test).float().mean().item()
            if reject:
                other = noise(999, torch.Generator().manual_seed(seed + 1), x_test)
                hit = model(other).argmax(1) == REJECT_CLASS
                accuracy["noise_rejected"] = hit.float().mean().item()
        state = {k: v.half().contiguous() for k, v in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return accuracy


def train_unet(folder: Path, *, steps: int, batch: int = 128, seed: int = 0) -> None:
    """Train the UNet, with labels dropped with probability 0.1, and save its EMA in float16."""
    x, y, _, _ = images()
    torch.manual_seed(seed)
    model, noise_scheduler = new_unet().train(), scheduler()
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.05
    )
    bar = tqdm(range(steps), desc="unet")
    for step in bar:
        i = torch.randint(len(x), (batch,))
        t = torch.randint(1000, (batch,))
        label = torch.where(torch.rand(batch) < 0.1, NULL_CLASS, y[i])
        eps = torch.randn(batch, *SHAPE)
        loss = F.mse_loss(
            model(noise_scheduler.add_noise(x[i], eps, t), t, class_labels=label).sample, eps
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    average: Any = ema.module
    average.half().save_pretrained(folder / "unet")
